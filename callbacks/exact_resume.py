"""Resume a run as if it had never stopped."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_peft.training.lightning_internals import (
    is_within_step,
    log_row_of_step,
    validation_follows,
    validation_is_next,
    validations_are_done,
)
from lit_peft.training.run_folder import RunLogger

KEY = "exact_resume"


class ExactResume(Callback):
    """Completes the validations and the log of a resumed run, wherever the run was killed.

    `ModelCheckpoint(every_n_train_steps=…)` writes its checkpoint in the middle of a step. If the run is killed between
    the checkpoint and the end of the step, Lightning resumes after the step: a validation that was due is skipped, with
    the best checkpoint that it might have chosen, and the step's row of the log is missing. With this callback, the
    checkpoints record what is still due, and the log of a `RunLogger` (used by `lit-peft fit`) is reset to the
    checkpoint.
    """

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        within_a_step = is_within_step(trainer)
        logger = _run_logger(trainer)
        if logger is not None:
            checkpoint[KEY] = {"rows": logger.rows(), "row": log_row_of_step(trainer) if within_a_step else None}
        validations_are_done(checkpoint["loops"]["fit_loop"])
        if within_a_step and validation_follows(trainer):
            validation_is_next(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._known = checkpoint.get(KEY) or {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logger = _run_logger(trainer)
        if logger is not None:
            logger.go_back(**(self._known or {"rows": 0}))


def _run_logger(trainer: pl.Trainer) -> RunLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
