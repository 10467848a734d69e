"""The exponential moving average of the trained parameters."""

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

from lit_peft.nn.torch_internals import lerp_all_
from lit_peft.util.errors import LitPeftError

KEY = "adapter_ema"


class AdapterEMA(Callback):
    """Keeps an exponential moving average (EMA) of the trained parameters: `ema = d · ema + (1 - d) · parameter`.

    Unlike Lightning's `EMAWeightAveraging`, it copies only the trained parameters, not the model. The average replaces
    the parameters during validation, in the `state_dict` of every checkpoint, in the folders of `AdapterCheckpoint`,
    and after training, so also in testing. Checkpoints contain the parameters themselves as well, so that a run resumes
    exactly. The average is kept in float32 at least: in bfloat16 it would not move any more with `d = 0.999`.

    Args:
        decay: d; with `warmup` less in the first steps, `(1 + n) / (10 + n)` after n updates.
        every_n_steps: optimizer steps between updates.
        start_step: optimizer steps before the first update; until then the average equals the parameters.
        warmup: start with a smaller decay.

    Raises:
        LitPeftError: `decay` is not in [0, 1), or a number of steps is out of range.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise LitPeftError(f"decay={decay}: give a number of at least 0 and below 1, e.g. 0.999.")
        if every_n_steps < 1 or start_step < 0:
            raise LitPeftError(f"every_n_steps={every_n_steps}, start_step={start_step}: give at least 1 and 0.")
        self.decay, self.every_n_steps, self.start_step, self.warmup = decay, every_n_steps, start_step, warmup
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        # The parameters' own values while the average replaces them; else empty.
        self._own: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if set(self._average) == set(trained(pl_module)):
            self._use_own(pl_module)
        else:
            self._own, self.updates = {}, 0
            self._average = {name: _wide(p.detach()).clone() for name, p in trained(pl_module).items()}

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
            lerp_all_(averages, [_wide(p.detach()) for p in parameters.values()], 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._use_average(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._use_own(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._use_average(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._use_own(pl_module)

    @contextmanager
    def averaged(self, module: pl.LightningModule) -> Iterator[None]:
        """Return a context in which the module's trained parameters are the average."""
        before = bool(self._own)
        self._use_average(module)
        try:
            yield
        finally:
            if not before:
                self._use_own(module)

    @torch.no_grad()
    def _use_average(self, module: pl.LightningModule) -> None:
        if self._average and not self._own:
            parameters = trained(module)
            self._own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                parameter.copy_(self._average[name])

    @torch.no_grad()
    def _use_own(self, module: pl.LightningModule) -> None:
        if self._own:
            for name, parameter in trained(module).items():
                parameter.copy_(self._own[name])
            self._own = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._average:
            return
        state, parameters = checkpoint["state_dict"], trained(pl_module)
        own = self._own or {name: parameter.detach() for name, parameter in parameters.items()}
        for name, average in self._average.items():
            if name in state:
                state[name] = average.to(parameters[name].dtype, copy=True)
        checkpoint[KEY] = {
            "parameters": {name: value.clone() for name, value in own.items()},
            # What the state_dict, which has the parameters' types, cannot hold exactly.
            "average": {name: v.clone() for name, v in self._average.items() if v.dtype != parameters[name].dtype},
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
        self._average = {name: _wide(parameter.detach()).clone() for name, parameter in parameters.items()}
        self._own, self.updates = {}, stored["updates"]
        for name, value in stored.get("average", {}).items():
            self._average[name].copy_(value)
        for name, parameter in parameters.items():
            parameter.copy_(stored["parameters"][name])


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def averaged(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Return a context in which the trained parameters are the average of the Trainer's `AdapterEMA`, if it has one."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterEMA):
                stack.enter_context(callback.averaged(module))
        yield
