"""Save adapters during training, as folders that other libraries can load."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lit_peft.callbacks.adapter_ema import averaged
from lit_peft.callbacks.adapter_folders import read_note, remove_folder, set_link, write_adapter_folder
from lit_peft.callbacks.non_finite_guard import check_weights
from lit_peft.callbacks.tensors import trained
from torch import Tensor

from lit_peft.training.lightning_internals import SelectiveCheckpoint
from lit_peft.training.run_folder import RunLogger
from lit_peft.training.sharding import whole_parameters
from lit_peft.util.disk import clear_folder, replace_folder, temporary_folder, write_failure
from lit_peft.util.errors import LitPeftError
from lit_peft.util.locks import FolderInUseError, FolderLock, lock_folder


class AdapterCheckpoint(Callback):
    """Writes the adapter as a folder: the best ones by a monitored value, and the last one.

    The rules of what to keep and when to save, and the arguments for them, are those of `ModelCheckpoint`. Each folder
    contains `adapter_config.json` and `adapter_model.safetensors` in the method's format (for a module without a
    lit_peft method, its trained tensors by name), and `adapter_checkpoint.json` with step, epoch and monitored value.
    `last` is a link to the newest folder.

    A folder appears only when it is complete and synced to the disk. An older one is removed only when nothing refers
    to it any more, not even the training checkpoint on disk. A run resumed from a training checkpoint continues with
    its list of the best adapters. This is not a `Checkpoint` of Lightning: the training checkpoints, and the meaning of
    `ckpt_path="best"` and `"last"`, remain those of `ModelCheckpoint`.

    Args:
        dirpath: the folder that contains the folders; `adapters` in the run's folder if unset. Only one run at a time
            may write to it.
        filename: name of a folder, with metrics in braces.
        monitor: the logged value to choose by; if unset, the newest adapter is kept.
        mode: `min` or `max`.
        save_top_k: number of the best adapters to keep; -1: all, 0: none.
        save_last: also keep the last adapter.
        every_n_train_steps: optimizer steps between saves.
        every_n_epochs: epochs between saves; every epoch if no interval is given.
        train_time_interval: time between saves.
        save_on_train_epoch_end: save at the end of the training epoch instead of the end of validation.
        save_on_exception: save the last adapter if training fails.
        format: `peft` or `adapterhub`; the method's own format if unset.
        asynchronous: write folders to the disk in a thread while training continues. An error is raised at the next
            save.

    Raises:
        LitPeftError: another run writes to the folder, a trained weight is infinite or NaN, or writing failed; existing
            folders are unchanged.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "{step}",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        format: Literal["peft", "adapterhub"] | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.keeper = _Keeper(
            dirpath=dirpath,
            filename="best-" + filename if monitor else filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            save_on_train_epoch_end=save_on_train_epoch_end,
            save_on_exception=save_on_exception,
        )
        self.keeper.format = format
        self.keeper.asynchronous = asynchronous

    @property
    def best_model_path(self) -> str:
        """The folder of the best adapter; empty before the first save."""
        return self.keeper.best_model_path

    @property
    def best_model_score(self) -> Tensor | None:
        """The best monitored value."""
        return self.keeper.best_model_score

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """The folders of the best adapters, and their monitored values."""
        return self.keeper.best_k_models

    @property
    def last_model_path(self) -> str:
        """The folder of the last adapter; empty before the first save."""
        return self.keeper.last_model_path

    @property
    def state_key(self) -> str:
        return self.keeper.state_key.replace("_Keeper", type(self).__name__, 1)

    def state_dict(self) -> dict[str, Any]:
        return self.keeper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.keeper.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.keeper.open(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keeper.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.keeper.sweep(trainer)
        self.keeper.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keeper.on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keeper.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keeper.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            self.keeper.on_exception(trainer, pl_module, exception)
        finally:
            self.keeper.close(finished=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.keeper.close(finished=stage == "fit")


class _Keeper(SelectiveCheckpoint):  # checkpoints refer to it by this name
    """Applies the rules of `ModelCheckpoint` to folders."""

    FILE_EXTENSION = ""
    CHECKPOINT_NAME_LAST = "last-{step}"
    format: Literal["peft", "adapterhub"] | None = None
    asynchronous: bool = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._lock: FolderLock | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._doomed: list[str] = []
        self._removable: set[str] = set()
        self._orphans: dict[str, int] = {}
        self._module: Any = None
        # Marks the folders of this run. A resumed run takes over the mark.
        self._run = uuid.uuid4().hex

    # ------------------------------------------------------------------------------ start and end of a run

    def open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lock the folder for this run, and clean up after a killed one."""
        self._module = pl_module
        if self.dirpath is None:
            root = Path(trainer.log_dir or trainer.default_root_dir)
            if isinstance(trainer.logger, RunLogger):
                # All folders in the run's own folder belong to it, even if it was killed before its first checkpoint.
                self._run = "the folder's"
            self.dirpath = str(root.expanduser().resolve() / "adapters")
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        super().setup(trainer, pl_module, "fit")
        problem = ""
        if trainer.is_global_zero:
            try:
                self._lock_folder(Path(str(self.dirpath)))
            except (OSError, FolderInUseError) as error:
                problem = (
                    f"dirpath={str(self.dirpath)!r} is in use by another run ({error}): give each run a folder of its "
                    "own."
                    if isinstance(error, FolderInUseError)
                    else f"Adapters cannot be written to dirpath={str(self.dirpath)!r} ({error}): give another folder."
                )
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise LitPeftError(problem)
        if self.asynchronous and trainer.is_global_zero:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="adapter-checkpoint")

    def _lock_folder(self, folder: Path) -> None:
        # All callbacks of a process share it.
        self._lock = lock_folder(folder)
        clear_folder(folder)
        self._find_orphans()

    def _find_orphans(self) -> None:
        """Find the folders of this run that are not in its list."""
        self._orphans = {}
        for folder in Path(str(self.dirpath)).iterdir():
            note = read_note(folder)
            if self._is_own(note) and str(folder) not in self._kept() and not folder.is_symlink():
                self._orphans[str(folder)] = note["step"]

    def close(self, finished: bool) -> None:
        """Finish writing, and unlock the folder."""
        try:
            if finished:
                self._doomed += self._orphans
                self._removable.update(self._doomed)
                self._remove()
            self._wait()
        finally:
            self._pending = []
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            self._module = None

    # ------------------------------------------------------------------------------------------- saving

    def write(self, trainer: pl.Trainer, path: str) -> None:
        name = self.monitor
        value = trainer.callback_metrics.get(name) if name else None
        note = {
            "callback": self.state_key,
            "run": self._run,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "monitor": name,
            "value": None if value is None else value.item(),
            "mode": self.mode,
        }
        problem = ""
        with averaged(trainer, self._module), whole_parameters(trainer.strategy.model or self._module):
            check_weights(trainer, trained(self._module).items(), "no folder of them is written")
            if trainer.is_global_zero:
                try:
                    self._write_folder(Path(path), note)
                except OSError as error:
                    problem = write_failure("The adapter", Path(path), error)
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise LitPeftError(problem)

    def _write_folder(self, target: Path, note: dict[str, Any]) -> None:
        temporary = temporary_folder(target)
        try:
            write_adapter_folder(self._module, temporary, self.format, note)
            self._run_or_queue(lambda: replace_folder(temporary, target), target, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def after_last(self, trainer: pl.Trainer) -> None:
        if self.save_last and trainer.is_global_zero:
            link, target = Path(str(self.dirpath)) / "last", Path(self.last_model_path)
            self._run_or_queue(lambda: set_link(link, target.name), link)

    def file_exists(self, filepath: Any, trainer: pl.Trainer) -> bool:
        # A resumed run may come again to a step that it saved before it was killed: it replaces its own folders.
        own = trainer.is_global_zero and self._is_own(read_note(Path(filepath)))
        return False if trainer.strategy.broadcast(own) else super().file_exists(filepath, trainer)

    def _is_own(self, note: dict[str, Any]) -> bool:
        return note.get("callback") == self.state_key and note.get("run") == self._run

    # ----------------------------------------------------------------------------------------- removing

    def remove(self, trainer: pl.Trainer, path: str) -> None:
        self._doomed.append(path)
        if not any(isinstance(callback, Checkpoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._removable.add(path)

    def sweep(self, trainer: pl.Trainer) -> None:
        """Remove the folders that no training checkpoint refers to any more, and those that a killed run left."""
        outdated = [path for path, step in self._orphans.items() if step < trainer.global_step]
        for path in outdated:
            del self._orphans[path]
            if path not in self._kept():
                self._doomed.append(path)
                self._removable.add(path)
        self._remove()

    def _kept(self) -> set[str]:
        return {*self.best_k_models, self.best_model_path, self.last_model_path}

    def _remove(self) -> None:
        ready = [path for path in self._doomed if path in self._removable]
        self._doomed = [path for path in self._doomed if path not in self._removable]
        self._removable -= set(ready)
        if self._lock is not None:
            for path in ready:
                if path not in self._kept():
                    self._run_or_queue(partial(remove_folder, Path(path)), Path(path))

    # -------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        # All folders that a training checkpoint refers to must be on the disk before it.
        self._wait()
        self._removable.update(self._doomed)
        return {**super().state_dict(), "run": self._run, "step": self.saved_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._run = state_dict["run"]
        # While gradients are accumulated, the next batch ends at the same step, which is already saved.
        self.saved_step = state_dict.get("step", 0)
        if self._lock is None:
            return
        self.best_k_models = {path: value for path, value in self.best_k_models.items() if Path(path).is_dir()}
        self._find_orphans()

    # ------------------------------------------------------------------------------------------ writing

    def _run_or_queue(self, work: Callable[[], None], target: Path, temporary: Path | None = None) -> None:
        """Do the work now, or, if asynchronous, after all earlier work; remove `temporary` if earlier work failed."""
        if self._writer is None:
            try:
                work()
            except OSError as error:
                raise LitPeftError(write_failure("The adapter", target, error)) from error
            return
        self._wait(done_only=True)
        before = self._pending[-1] if self._pending else None

        def in_turn() -> None:
            # If a folder could not be written, the one that it should replace must not be removed.
            try:
                if before is not None:
                    before.result()
            except BaseException:
                if temporary is not None:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise
            work()

        self._pending.append(self._writer.submit(in_turn))

    def _wait(self, done_only: bool = False) -> None:
        waiting = [future for future in self._pending if not done_only or future.done()]
        try:
            for future in waiting:
                future.result()
                self._pending.remove(future)
        except OSError as error:
            self._pending = []
            raise LitPeftError(write_failure("The adapter", Path(str(self.dirpath)), error)) from error
