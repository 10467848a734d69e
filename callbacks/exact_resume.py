"""Training checkpoints that a run goes on from as if it had never stopped."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_peft.training.run_folder import RunLogger

KEY = "exact_resume"


class ExactResume(Callback):
    """Lets a run that was killed anywhere go on with its validations and its log complete.

    A checkpoint of `ModelCheckpoint(every_n_train_steps=…)` is written within a step. When the run is killed between
    it and what belongs to the step, Lightning goes on behind that: a validation that was due is skipped, and with it
    the best checkpoint it would have chosen, and the step's row of the log is missing. The checkpoints written beside
    this callback say what was due; and the log of a `RunLogger` (that of `lit-peft fit`) is brought back to where it
    was.
    """

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        total = loop.batch_progress.total
        within_a_step = bool(trainer.training) and total.completed == total.processed - 1
        logger = _run_logger(trainer)
        if logger is not None:
            checkpoint[KEY] = {"rows": logger.rows(), "row": _row(trainer) if within_a_step else None}
        fetcher = trainer.fit_loop._data_fetcher
        if within_a_step and fetcher is not None and loop._should_check_val_fx(fetcher):
            _validation_is_next(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._known = checkpoint.get(KEY) or {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logger = _run_logger(trainer)
        if logger is not None:
            logger.go_back(**(self._known or {"rows": 0}))


class _Recorder:
    """Takes the place of a logger, to see what it would be given."""

    row: dict[str, Any] | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.row = {**metrics, "step": step}

    def save(self) -> None:
        pass


def _run_logger(trainer: pl.Trainer) -> RunLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


def _row(trainer: pl.Trainer) -> dict[str, Any] | None:
    """What the step that is ending is going to log."""
    loggers, recorder = trainer.loggers, _Recorder()
    try:
        trainer.loggers = [recorder]  # type: ignore[list-item]
        trainer._logger_connector.update_train_step_metrics()
    finally:
        trainer.loggers = loggers
    return recorder.row


def _validation_is_next(loops: dict[str, Any]) -> None:
    """Say in the state of the loops that the batch is done, and its validation has begun."""
    for counts in ("total", "current"):
        loops["epoch_loop.batch_progress"][counts]["completed"] += 1
        validated = loops["epoch_loop.val_loop.batch_progress"][counts]
        done = validated["completed"] if counts == "total" else 0
        validated.update(ready=done + 1, started=done + 1, processed=done, completed=done)
