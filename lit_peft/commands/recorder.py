"""The learning curve and the step times of a run of `lit-peft compare`."""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback


class Recorder(Callback):
    """Records the monitored metric at every validation, with the step and the seconds of training so far.

    Args:
        monitor: name of the logged metric.
        skip: number of batches at the start that `seconds_per_step` leaves out.
    """

    def __init__(self, monitor: str, skip: int = 0) -> None:
        self.monitor = monitor
        self.skip = skip
        self.curve: list[list[float]] = []
        self._times: list[float] = []
        self._start = 0.0

    @property
    def seconds_per_step(self) -> float:
        """The median time of a batch: forward pass, backward pass and optimizer."""
        return statistics.median(self._times[self.skip :]) if self._times[self.skip :] else 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._start = _now()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._times.append(_now() - self._start)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            # The command has ended, so nobody would receive the result.
            signal.raise_signal(signal.SIGKILL)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        value = float(trainer.callback_metrics[self.monitor])
        self.curve.append([trainer.global_step, round(sum(self._times), 4), value])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
