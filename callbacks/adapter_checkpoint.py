"""Adapters saved during training, as folders that other libraries load."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lit_peft.callbacks.adapter_ema import averaged
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_peft.formats.files import write_json
from lit_peft.formats.folder import write_adapter
from lit_peft.methods.attachment import attached_model
from lit_peft.training.run_folder import RunLogger
from lit_peft.training.sharding import whole_parameters
from lit_peft.util.disk import replace_folder, sync, temporary_folder, write_failure
from lit_peft.util.errors import LitPeftError

NOTE = "adapter_checkpoint.json"


class AdapterCheckpoint(Callback):
    """Writes the adapter as a folder: the best ones by a monitored value, and the last one.

    Which and when is decided as `ModelCheckpoint` decides it, and the arguments are its own. Each folder holds
    `adapter_config.json` and `adapter_model.safetensors`, in the method's format (a module without a lit_peft method:
    its trainable tensors by name), and `adapter_checkpoint.json`: step, epoch, monitored value. `last` is a link to
    the newest one.

    A folder appears whole or not at all, and synced to the disk; an older one is removed only when nothing refers to
    it any more, the training checkpoint on disk included. A run resumed from a training checkpoint goes on with its
    list of the best. It is no `Checkpoint` of Lightning's: the training checkpoints, and what `ckpt_path="best"` and
    `"last"` mean, stay those of `ModelCheckpoint`.

    Args:
        dirpath: folder of the folders; `adapters` in the run's folder when unset. One run at a time writes to it.
        filename: name of a folder, with metrics in braces.
        monitor: the logged value to choose by; the newest adapter is kept when unset.
        mode: `min` or `max`.
        save_top_k: how many of the best to keep; -1: all, 0: none.
        save_last: keep the last one, too.
        every_n_train_steps: optimizer steps between savings.
        every_n_epochs: epochs between savings; each one when nothing else is given.
        train_time_interval: time between savings.
        save_on_train_epoch_end: save at the end of the training epoch, rather than of the validation.
        save_on_exception: save the last one when training breaks off.
        format: `peft` or `adapterhub`; the method's own when unset.
        asynchronous: bring folders to the disk in a thread, while training goes on. An error shows at the next saving.

    Raises:
        LitPeftError: another run writes to the folder, or writing failed; the folders that were there still are.
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
        """The best adapter's folder; empty before the first."""
        return self.keeper.best_model_path

    @property
    def best_model_score(self) -> Tensor | None:
        """The best monitored value."""
        return self.keeper.best_model_score

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """The folders kept for their monitored value, and that value."""
        return self.keeper.best_k_models

    @property
    def last_model_path(self) -> str:
        """The last adapter's folder; empty before the first."""
        return self.keeper.last_model_path

    @property
    def state_key(self) -> str:
        return self.keeper.state_key.replace("_Keeper", type(self).__name__, 1)

    def state_dict(self) -> dict[str, Any]:
        return self.keeper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.keeper.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:
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


class _Keeper(ModelCheckpoint):
    """`ModelCheckpoint`'s rules over folders."""

    FILE_EXTENSION = ""
    CHECKPOINT_NAME_LAST = "last-{step}"
    format: Literal["peft", "adapterhub"] | None = None
    asynchronous: bool = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._lock: FileLock | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._doomed: list[str] = []
        self._removable: set[str] = set()
        self._orphans: dict[str, int] = {}
        self._module: Any = None
        # Tells this run's folders from another's; a resumed run has its own again.
        self._run = uuid.uuid4().hex

    # ----------------------------------------------------------------------------------- the run's span

    def open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the folder for this run, and clear away what a killed one left half written."""
        self._module = pl_module
        if self.dirpath is None:
            root = Path(trainer.log_dir or trainer.default_root_dir)
            if isinstance(trainer.logger, RunLogger):
                # Whatever a start of this run left in its own folder is this run's, were it killed before its first
                # checkpoint.
                self._run = "the folder's"
            self.dirpath = str(root.expanduser().resolve() / "adapters")
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        super().setup(trainer, pl_module, "fit")
        problem = ""
        if trainer.is_global_zero:
            try:
                self._take(Path(str(self.dirpath)))
            except (OSError, Timeout) as error:
                problem = (
                    f"dirpath={str(self.dirpath)!r} is being written by another run: give each run its own."
                    if isinstance(error, Timeout)
                    else f"Adapters cannot be written to dirpath={str(self.dirpath)!r} ({error}): give another folder."
                )
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise LitPeftError(problem)
        if self.asynchronous and trainer.is_global_zero:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="adapter-checkpoint")

    def _take(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # One lock for all callbacks of a process.
        lock = FileLock(folder / ".lock", is_singleton=True)
        lock.acquire(blocking=False)
        self._lock = lock
        for left in folder.glob(".*.old"):
            # Killed between taking the old folder away and putting the new one in its place.
            target = folder / left.name[1:].removesuffix(".old")
            if target.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(target)
        for left in folder.glob(".*.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._find_orphans()

    def _find_orphans(self) -> None:
        """Note the folders of this run that it does not know of."""
        self._orphans = {}
        for folder in Path(str(self.dirpath)).iterdir():
            note = _note(folder)
            if self._own(note) and str(folder) not in self._kept() and not folder.is_symlink():
                self._orphans[str(folder)] = note["step"]

    def close(self, finished: bool) -> None:
        """Finish what is being written, and let the folder go."""
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

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
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
            if trainer.is_global_zero:
                try:
                    self._write(Path(filepath), note)
                except OSError as error:
                    problem = _failure(Path(filepath), error)
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise LitPeftError(problem)

    def _write(self, target: Path, note: dict[str, Any]) -> None:
        temporary = temporary_folder(target)
        try:
            _fill(self._module, temporary, self.format)
            write_json(temporary / NOTE, note)
            self._do(lambda: replace_folder(temporary, target), target, temporary)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, SafetensorError):  # its only trouble in writing is the disk
                raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
            raise

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        if self.save_last and trainer.is_global_zero:
            link, target = Path(str(self.dirpath)) / "last", Path(self.last_model_path)
            self._do(lambda: _link(link, target.name), link)

    def file_exists(self, filepath: Any, trainer: pl.Trainer) -> bool:
        # A killed run that is resumed comes again to what it wrote before: that is written over.
        own = trainer.is_global_zero and self._own(_note(Path(filepath)))
        return False if trainer.strategy.broadcast(own) else super().file_exists(filepath, trainer)

    def _own(self, note: dict[str, Any]) -> bool:
        return note.get("callback") == self.state_key and note.get("run") == self._run

    # ----------------------------------------------------------------------------------------- removing

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._doomed.append(filepath)
        if not any(isinstance(callback, Checkpoint) for callback in trainer.callbacks):
            self._removable.add(filepath)

    def sweep(self, trainer: pl.Trainer) -> None:
        """Remove the folders that no training checkpoint refers to any more, and those that a killed run left."""
        passed = [path for path, step in self._orphans.items() if step < trainer.global_step]
        for path in passed:
            del self._orphans[path]
            if path not in self._kept():
                self._doomed.append(path)
                self._removable.add(path)
        self._remove()

    def _kept(self) -> set[str]:
        return {*self.best_k_models, self.best_model_path, self.last_model_path}

    def _remove(self) -> None:
        gone = [path for path in self._doomed if path in self._removable]
        self._doomed = [path for path in self._doomed if path not in self._removable]
        self._removable -= set(gone)
        if self._lock is not None:
            for path in gone:
                if path not in self._kept():
                    self._do(lambda path=path: _discard(Path(path)), Path(path))  # type: ignore[misc]

    # -------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        # What a training checkpoint refers to is on the disk before it.
        self._wait()
        self._removable.update(self._doomed)
        return {**super().state_dict(), "run": self._run, "step": self._last_global_step_saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._run = state_dict["run"]
        # Where gradients are added up, the next batch ends at the same step, which is saved already.
        self._last_global_step_saved = state_dict.get("step", 0)
        if self._lock is None:
            return
        self.best_k_models = {path: value for path, value in self.best_k_models.items() if Path(path).is_dir()}
        self._find_orphans()

    # ------------------------------------------------------------------------------------------ writing

    def _do(self, work: Callable[[], None], target: Path, temporary: Path | None = None) -> None:
        """Do it now, or, asynchronously, after everything begun before; `temporary` goes if that failed."""
        if self._writer is None:
            try:
                work()
            except OSError as error:
                raise LitPeftError(_failure(target, error)) from error
            return
        self._wait(done_only=True)
        before = self._pending[-1] if self._pending else None

        def in_turn() -> None:
            # Nothing is removed after what was to replace it failed.
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
            raise LitPeftError(_failure(Path(str(self.dirpath)), error)) from error


def _fill(module: nn.Module, folder: Path, format: Literal["peft", "adapterhub"] | None) -> None:
    """Write the adapter's files; a module without a method: its trainable tensors by name."""
    model = attached_model(module)
    if model is not None:
        with contextlib.suppress(LitPeftError):  # a method that no format has: its tensors
            write_adapter(model, folder, format)
            return
    tensors = {
        name: parameter.detach().cpu().clone().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_json(folder / "adapter_config.json", {"module": type(module).__name__, "tensors": names})


def _note(folder: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note


def _link(link: Path, name: str) -> None:
    """Point `link` to the folder `name` beside it, in one step."""
    new = link.with_name(f".{link.name}.tmp-{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(name, target_is_directory=True)
    new.replace(link)
    sync(link.parent)


def _discard(folder: Path) -> None:
    """Remove a folder so that nobody sees half of it."""
    if folder.is_dir():
        away = folder.with_name(f".{folder.name}.tmp-gone")
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _failure(target: Path, error: OSError) -> str:
    return write_failure("The adapter", target, error)
