"""Measure the speed and the memory of training."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_peft.util.errors import LitPeftError
from lit_peft.util.memory import peak_memory


class Throughput(Callback):
    """Logs tokens and samples per second of all devices, the model FLOPs utilization (MFU), and the peak memory.

    It logs `tokens_per_second`, `samples_per_second`, `mfu` and `peak_memory_mb`, each over the steps since the last
    time, without validation. Tokens are counted by `attention_mask`, so padding does not count, or by `input_ids` if
    there is no mask. FLOPs are counted in the forward and backward pass of the first batch, and scaled by the number of
    samples afterwards. MFU divides them by the peak of the device. Peak memory is the allocated memory of the
    accelerator, or the resident memory of the process on a CPU.

    Args:
        every_n_steps: optimizer steps between measurements; the Trainer's `log_every_n_steps` if unset.
        peak_flops: peak FLOP per second of one device; if unset, looked up for most GPUs, and no MFU on other devices.
        count_flops: count the FLOPs of the first batch; without this there is no MFU.

    Raises:
        LitPeftError: a number is not positive.
    """

    def __init__(
        self, every_n_steps: int | None = None, peak_flops: float | None = None, count_flops: bool = True
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("peak_flops", peak_flops)):
            if value is not None and not value > 0:
                raise LitPeftError(f"{name}={value}: give a positive number, or leave it unset.")
        self.every_n_steps, self.peak_flops, self.count_flops = every_n_steps, peak_flops, count_flops
        self.flops_per_sample: float | None = None
        self._counter: FlopCounterMode | None = None
        self._reset()

    def _reset(self) -> None:
        self._tokens: Any = 0
        self._samples, self._seconds = 0, 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()
        self._step = trainer.global_step
        if self.peak_flops is None:
            self.peak_flops = _peak_flops(trainer)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.count_flops and self.flops_per_sample is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        samples, tokens = _size(batch)
        if self._stop_counting() and samples and self._counter is not None:
            # Counting is slow, so this batch is not timed.
            self.flops_per_sample = self._counter.get_total_flops() / samples
            self._counter = None
            self._reset()
            self._step = trainer.global_step
            return
        self._samples += samples
        self._tokens = self._tokens + tokens
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step - self._step >= every > 0 and self._samples:
            self._log(trainer)
            self._step = trainer.global_step

    def _log(self, trainer: pl.Trainer) -> None:
        tokens = int(self._tokens)  # this waits until the device has finished its work
        seconds = self._seconds + (time.perf_counter() - (self._since or time.perf_counter()))
        values = {"samples_per_second": self._samples * trainer.world_size / seconds}
        if tokens:
            values["tokens_per_second"] = tokens * trainer.world_size / seconds
        if self.flops_per_sample and self.peak_flops:
            values["mfu"] = self.flops_per_sample * self._samples / seconds / self.peak_flops
        memory = _peak_memory(trainer.strategy.root_device)
        if memory is not None:
            values["peak_memory_mb"] = memory / 2**20
        for name, value in values.items():
            trainer.lightning_module.log(name, value, batch_size=1)
        self._reset()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> bool:
        if self._counter is None:
            return False
        self._counter.__exit__(None, None, None)
        return True


def _size(batch: Any) -> tuple[int, Any]:
    """Return the number of samples and of tokens in a batch; the latter as a tensor if it is counted on the device."""
    if isinstance(batch, dict) and isinstance(batch.get("attention_mask"), Tensor):
        return len(batch["attention_mask"]), batch["attention_mask"].sum()
    if isinstance(batch, dict) and isinstance(batch.get("input_ids"), Tensor):
        return len(batch["input_ids"]), batch["input_ids"].numel()
    while isinstance(batch, dict | list | tuple) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return (len(batch), 0) if isinstance(batch, Tensor) and batch.dim() else (0, 0)


def _peak_flops(trainer: pl.Trainer) -> float | None:
    dtype = {"16": torch.float16, "bf16": torch.bfloat16}.get(str(trainer.precision).partition("-")[0], torch.float32)
    device = trainer.strategy.root_device
    return get_available_flops(device, dtype) if device.type in ("cuda", "xla") else None


def _peak_memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return peak_memory() if device.type == "cpu" else None
