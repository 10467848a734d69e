"""Write the last training checkpoint apart from the best one, often enough that a killed run loses little."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_peft.training.lightning_internals import accumulates_further, validation_follows
from lit_peft.training.run_folder import RunLogger
from lit_peft.util.errors import LitPeftError

# The share of the time that may go into checkpoints written by the clock.
_SHARE = 0.05


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` after every validation, at the end of every epoch, and by the clock or the steps between them.

    Since Lightning 2.6, `ModelCheckpoint(save_last=True)` writes it only together with a new best one. If the Trainer
    has such a callback, both write the same file. `lit-peft fit` has this callback by default. Add `ExactResume` to go
    on exactly from checkpoints between validations.

    If writing takes so long that more than 5 % of the time would go into it, e.g. in full fine-tuning, the time between
    checkpoints becomes longer, which is said.

    Put it behind every other `ModelCheckpoint` of the Trainer, since it saves their state as well.

    Args:
        dirpath: folder of the file; `checkpoints` in the run's folder if unset.
        every_n_minutes: most minutes of training between checkpoints; if None, the clock does not matter.
        every_n_train_steps: optimizer steps between checkpoints; if None, their number does not matter.

    Raises:
        LitPeftError: a number is not positive, or a `ModelCheckpoint` comes after this callback.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_minutes: float | None = 5.0,
        every_n_train_steps: int | None = None,
    ) -> None:
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise LitPeftError(f"every_n_minutes={every_n_minutes}: give a positive number, e.g. 5, or None.")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise LitPeftError(f"every_n_train_steps={every_n_train_steps}: give a positive number, or None.")
        super().__init__(dirpath=dirpath, save_top_k=0, save_last=True)
        self.minutes, self.steps = every_n_minutes, every_n_train_steps
        self._step = 0
        self._due = False
        self._saved_at = self._took = 0.0
        self._clock_step, self._started = 0, (0, 0.0)

    def describe(self) -> str:
        """Return when the checkpoint is written, in words."""
        moments = ["every validation", "every epoch"]
        if self.minutes is not None:
            moments.append(f"every {self.minutes:g} minutes")
        if self.steps is not None:
            moments.append(f"every {self.steps:,} steps")
        return ", ".join(moments[:-1]) + f" and {moments[-1]}"

    # ------------------------------------------------------------------------------------------- when to save

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks = trainer.checkpoint_callbacks
        later = callbacks[callbacks.index(self) + 1 :]
        if any(isinstance(callback, ModelCheckpoint) for callback in later):
            raise LitPeftError(
                "trainer.callbacks: LastCheckpoint comes before a ModelCheckpoint, whose state it would save too "
                "early: put it last."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.monotonic()
        self._step, self._due, self._saved_at, self._took = trainer.global_step, False, now, 0.0
        self._clock_step, self._started = trainer.global_step + 1, (trainer.global_step, now)
        if trainer.ckpt_path:
            _go_back(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are accumulated: a checkpoint would lose them
        self._step = trainer.global_step
        due = self._due or self._is_time(trainer)
        due = due or (self.steps is not None and self._step % self.steps == 0)
        # After the last batch, the end of the epoch saves, which Lightning would skip in a run resumed from here; but
        # a validation may come before it.
        if due and (not trainer.is_last_batch or validation_follows(trainer)):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or trainer.is_last_batch:
            return  # after the last batch, the best checkpoint is chosen at the end of the epoch
        if accumulates_further(trainer):
            self._due = True
        else:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass  # the end of the epoch has saved

    def _is_time(self, trainer: pl.Trainer) -> bool:
        """Whether it is time by the clock. All processes get the answer of the first one."""
        if self.minutes is None or self._step < self._clock_step:
            return False
        now = time.monotonic()
        left = self._saved_at + max(60 * self.minutes, self._took / _SHARE) - now
        if trainer.world_size == 1:
            return left <= 0
        # Asking the first process takes time: until a tenth of the interval has passed, nobody asks again.
        since, began = self._started
        pace = (now - began) / max(self._step - since, 1)
        wait = math.floor(max(left, 60 * self.minutes) / 10 / max(pace, 1e-6))
        is_time, wait = trainer.strategy.broadcast((left <= 0, wait))
        self._clock_step = self._step + max(wait, 1)
        return bool(is_time)

    # ---------------------------------------------------------------------------------------------- saving

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint now. Every process must call this."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._due = False
        began = time.monotonic()
        keeper = last_keeper(trainer)
        assert keeper is not None
        save_last(trainer, keeper)
        self._saved_at = time.monotonic()
        took, self._took = self._took, self._saved_at - began
        limit = 60 * (self.minutes or math.inf) * _SHARE
        if self._took > limit >= took:
            rank_zero_warn(
                f"The last checkpoint took {self._took:.0f} s to write, so that it is written every "
                f"{self._took / _SHARE / 60:.0f} minutes, not every {self.minutes:g}."
            )


def last_keeper(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """Return the callback whose last checkpoint is that of the run; None if the Trainer keeps no checkpoints."""
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    # One that writes a last checkpoint of its own accord comes before `LastCheckpoint`, which shares its file.
    return next((keeper for keeper in keepers if keeper.save_last), keepers[0] if keepers else None)


def save_last(trainer: pl.Trainer, keeper: ModelCheckpoint) -> Path:
    """Write the last checkpoint of `keeper`, whose `dirpath` is known; return its path."""
    name = f"{keeper.CHECKPOINT_NAME_LAST}{keeper.FILE_EXTENSION}"
    keeper.last_model_path = keeper.last_model_path or str(Path(str(keeper.dirpath)) / name)
    trainer.save_checkpoint(keeper.last_model_path, weights_only=False)
    return Path(keeper.last_model_path)


def last_good(trainer: pl.Trainer) -> Path | None:
    """Return the newest checkpoint of the run that is on the disk; None if there is none."""
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    files = [Path(path) for keeper in keepers for path in _paths(keeper) if Path(path).is_file()]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


# ---------------------------------------------------------------------------------- what a killed run left


def _go_back(trainer: pl.Trainer) -> None:
    """Make the files of checkpoints and the callbacks' lists of them those of the checkpoint that is being resumed.

    The killed run may have removed a checkpoint that the list names, and written ones that it does not know. The
    latter are removed if the run's folder is that of a `RunLogger`, which belongs to one run.
    """
    folder = trainer.log_dir  # communicates, so all processes need it
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    missing: set[str] = set()
    if trainer.is_global_zero:
        known = {path for keeper in keepers for path in _paths(keeper)}
        missing = {path for path in known if "://" not in path and not Path(path).exists()}
        if isinstance(trainer.logger, RunLogger) and folder:
            _remove_later(Path(folder), keepers, trainer)
    missing = trainer.strategy.broadcast(missing)
    for keeper in keepers:
        _forget(keeper, missing)


def _paths(keeper: ModelCheckpoint) -> set[str]:
    return {*keeper.best_k_models, keeper.best_model_path, keeper.last_model_path} - {""}


def _remove_later(folder: Path, keepers: list[ModelCheckpoint], trainer: pl.Trainer) -> None:
    """Remove the checkpoints that the killed run wrote after the one that is being resumed."""
    resumed = Path(str(trainer.ckpt_path)).resolve()
    known = {Path(path).resolve() for keeper in keepers for path in _paths(keeper)}
    for place in {Path(str(keeper.dirpath)).resolve() for keeper in keepers}:
        if folder.resolve() not in place.parents or place != resumed.parent:
            continue
        for file in place.glob("[!.]*.ckpt"):
            if file not in known | {resumed} and _step_of(file) > trainer.global_step:
                file.unlink(missing_ok=True)


def _step_of(file: Path) -> int:
    try:
        return int(torch.load(file, map_location="cpu", mmap=True, weights_only=True)["global_step"])
    except Exception:  # no checkpoint of Lightning: somebody else's
        return 0


def _forget(keeper: ModelCheckpoint, missing: set[str]) -> None:
    """Remove checkpoints that do not exist any more from the list of the best."""
    if keeper.last_model_path in missing:
        keeper.last_model_path = ""
    if not missing & {*keeper.best_k_models, keeper.best_model_path}:
        return
    keeper.best_k_models = {path: score for path, score in keeper.best_k_models.items() if path not in missing}
    choose = min if keeper.mode == "min" else max
    best = choose(keeper.best_k_models, key=lambda path: float(keeper.best_k_models[path]), default="")
    keeper.best_model_path, keeper.best_model_score = best, keeper.best_k_models.get(best)
    keeper.kth_best_model_path = ""
