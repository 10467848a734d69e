"""The exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lit_peft.callbacks.tensors import trained
from torch import Tensor

from lit_peft.util.errors import LitPeftError

KEY = "adapter_ema"


class AdapterEMA(Callback):
    """Keeps an exponential moving average (EMA) of the trained parameters: `ema = d · ema + (1 - d) · parameter`.

    Unlike Lightning's `EMAWeightAveraging`, it copies the trained sliver alone, not the model. The average stands in
    for the parameters during validation, in every checkpoint's `state_dict`, in the folders of `AdapterCheckpoint`, and
    when training has ended, so in testing, too. A checkpoint holds the parameters themselves besides, and a resumed run
    goes on exactly.

    Args:
        decay: d; in the first steps less, `(1 + n) / (10 + n)` after n updates, with `warmup`.
        every_n_steps: optimizer steps between updates.
        start_step: optimizer steps before the first update; the average is the parameters until then.
        warmup: begin with a smaller decay.

    Raises:
        LitPeftError: `decay` is not in [0, 1), or a number of steps is out of range.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise LitPeftError(f"decay={decay}: give a number from 0 up to, not including, 1, e.g. 0.999.")
        if every_n_steps < 1 or start_step < 0:
            raise LitPeftError(f"every_n_steps={every_n_steps}, start_step={start_step}: give at least 1 and 0.")
        self.decay, self.every_n_steps, self.start_step, self.warmup = decay, every_n_steps, start_step, warmup
        self.updates = 0
        # While the average stands in for the parameters, `_average` holds the parameters' own values.
        self._average: dict[str, Tensor] = {}
        self._swapped = False
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if set(self._average) == set(trained(pl_module)):
            self._swap(pl_module, to_average=False)
        else:
            self._swapped = False
            self._average = {name: p.detach().clone() for name, p in trained(pl_module).items()}
            self.updates = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step:
            return  # gradients are accumulated
        self._step = trainer.global_step
        parameters = trained(pl_module)
        if self._step <= self.start_step:
            for name, parameter in parameters.items():
                self._average[name].copy_(parameter)
        elif self._step % self.every_n_steps == 0:
            self.updates += 1
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
            averages = [self._average[name] for name in parameters]
            torch._foreach_lerp_(averages, [p.detach() for p in parameters.values()], 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average and trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, to_average=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, to_average=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module, to_average=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._swap(pl_module, to_average=False)

    @contextmanager
    def averaged(self, module: pl.LightningModule) -> Iterator[None]:
        """Within the block the module's trained parameters are the average."""
        before = self._swapped
        if self._average:
            self._swap(module, to_average=True)
        try:
            yield
        finally:
            self._swap(module, to_average=before)

    @torch.no_grad()
    def _swap(self, module: pl.LightningModule, to_average: bool) -> None:
        if self._average and self._swapped != to_average:
            for name, parameter in trained(module).items():
                held = self._average[name].clone()
                self._average[name].copy_(parameter)
                parameter.copy_(held)
            self._swapped = to_average

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._average:
            return
        current = {name: p.detach().clone() for name, p in trained(pl_module).items()}
        average, own = (current, self._average) if self._swapped else (self._average, current)
        checkpoint["state_dict"] |= {n: v.clone() for n, v in average.items() if n in checkpoint["state_dict"]}
        checkpoint[KEY] = {
            "parameters": {name: value.clone() for name, value in own.items()},
            "updates": self.updates,
        }

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        stored = checkpoint.get(KEY)
        if stored is None or trainer.state.fn != TrainerFn.FITTING:
            return
        parameters = trained(pl_module)
        self._average = {name: p.detach().clone() for name, p in parameters.items()}
        self._swapped, self.updates = False, stored["updates"]
        for name, parameter in parameters.items():
            parameter.copy_(stored["parameters"][name])


@contextmanager
def averaged(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Within the block the trained parameters are the average that a Trainer's `AdapterEMA` keeps, where it has one."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterEMA):
                stack.enter_context(callback.averaged(module))
        yield
