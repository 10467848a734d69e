"""Write a checkpoint before a run is stopped from outside."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lit_peft.callbacks.last_checkpoint import last_keeper, save_last

from lit_peft.training.lightning_internals import cluster_environment, request_stop


class GracefulStop(Callback):
    """On SIGTERM, SIGHUP or the first Ctrl-C, writes `last.ckpt` and stops; on SLURM's signal, also requeues the job.

    The signal only sets a flag. Training stops after an optimizer step, never during a validation, and all processes
    stop at the same step, so that a run can be resumed exactly from the checkpoint. The process ends with status 143
    (SIGTERM), 129 (SIGHUP: the terminal was closed) or 130 (Ctrl-C). A second Ctrl-C stops at once. Under `nohup`,
    which ignores SIGHUP, it remains ignored.

    The checkpoint is the last one of the Trainer's `ModelCheckpoint`; without one (`enable_checkpointing=False`), none
    is written. On SLURM, the requeued job also finds Lightning's own `hpc_ckpt_….ckpt`.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._requeue: Callable[..., Any] | None = None
        self._requeue_signal = 0
        self._steps = 0
        self._terminals: list[int] = []

    # ------------------------------------------------------------------------------------------ signals

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signal, self._steps = None, trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handle(number)
        # Windows has no such signal.
        hang_up = getattr(signal, "SIGHUP", None)
        if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
            self._handle(hang_up)
            self._terminals = [number for number in (1, 2) if os.isatty(number)]
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            # Lightning's handler would save in the middle of a step.
            number = environment.requeue_signal or signal.SIGUSR1
            self._handle(number)
            self._requeue, self._requeue_signal = self._before[number], number

    def _handle(self, number: int) -> None:
        self._before[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._signal is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self._signal = number
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminal()
        if number == signal.SIGINT:
            print("\nStopping after this step; Ctrl-C again stops at once.", flush=True)

    def _leave_terminal(self) -> None:
        # Writing to a terminal that was closed is an error, which would end the run before its checkpoint.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    # ------------------------------------------------------------------------------------------ stopping

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Half a validation is of no use: finish it first.
        request_stop(trainer, False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        """Make the loop stop where it checks next: after the step and its validation, or at the end of the epoch."""
        number = self._signal or 0
        if trainer.world_size > 1:
            ours = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(ours, reduce_op="max"))
        if not number:
            return
        if self._requeue is not None and number == self._requeue_signal:
            self._signal = None
            self._save(trainer)
            self._requeue(number, None)
            return
        self._signal = number
        request_stop(trainer, True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if not isinstance(exception, SIGTERMException):
            return
        exception.code = 128 + (self._signal or signal.SIGTERM)
        if self._signal is None:
            # Training had not started.
            return
        path = self._save(trainer)
        if trainer.is_global_zero:
            kept = (
                f"{path} is written. To continue, run the same command again with --ckpt_path last (from Python: "
                f"trainer.fit(..., ckpt_path={str(path)!r}))."
                if path
                else "The Trainer has no ModelCheckpoint, so the run cannot be resumed."
            )
            print(
                f"\nStopped by {signal.Signals(self._signal).name} after step {trainer.global_step}. {kept}", flush=True
            )

    def _save(self, trainer: pl.Trainer) -> Path | None:
        """Write the last checkpoint and return its path; None if the Trainer keeps no checkpoints."""
        keeper = last_keeper(trainer)
        return save_last(trainer, keeper) if keeper is not None else None
