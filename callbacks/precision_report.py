"""Measure the memory of training by type, in one training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lit_peft.callbacks.tensors import parts
from torch import Tensor, nn

Bytes = dict[str, int]


class PrecisionReport(Callback):
    """Prints the type and the bytes of everything that training keeps in memory, after the first optimizer step.

    - `base`: the frozen parameters, with the scales of quantized weights and the buffers;
    - `adapter`: the trained parameters; `gradients`: their gradients; `optimizer`: the state of the optimizer;
    - `activations`: what the forward pass saves for the backward pass, without parameters.

    All numbers are measured: activations are the tensors that autograd saves in the first batch of the step; shared
    memory counts once. In a sharded model, the numbers are those of this process.

    Attributes:
        report: bytes by part and type, e.g. `report["base"]["int8"]`; empty before the first step.
    """

    def __init__(self) -> None:
        self.report: dict[str, Bytes] = {}
        self._hooks = ExitStack()
        self._saved: dict[int, tuple[str, int]] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.report or self._saved is not None:
            return
        own = {part.untyped_storage().data_ptr() for tensor in _state(pl_module) for part in parts(tensor)}
        saved: dict[int, tuple[str, int]] = {}

        def record(tensor: Tensor) -> Tensor:
            for part in parts(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in own:
                    saved[storage.data_ptr()] = (_name(part), storage.nbytes())
            return tensor

        self._saved = saved
        self._hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._hooks.close()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if not self.report:
            self.report = {
                "base": _bytes(tensor for tensor in _state(pl_module) if not tensor.requires_grad),
                "adapter": _bytes(p for p in pl_module.parameters() if p.requires_grad),
                "gradients": _bytes(p.grad for p in pl_module.parameters() if p.grad is not None),
            }

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._hooks.close()  # with manual optimization no loss is returned
        if not self.report or "optimizer" in self.report:
            return
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        self.report["optimizer"] = _bytes(
            value for state in states for value in state.values() if isinstance(value, Tensor)
        )
        activations: Counter[str] = Counter()
        for name, size in (self._saved or {}).values():
            activations[name] += size
        self.report["activations"] = dict(activations)
        self._saved = None
        self._print()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._hooks.close()

    @rank_zero_only
    def _print(self) -> None:
        for part, types in self.report.items():
            text = ", ".join(f"{size / 2**20:,.2f} MB {name}" for name, size in sorted(types.items())) or "nothing"
            print(f"{part + ':':<13}{text}", flush=True)


def _state(module: nn.Module) -> list[Tensor]:
    """Return all tensors of a module: parameters, buffers, and the scales that bitsandbytes attaches to weights."""
    tensors = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors += [v for v in vars(state).values() if isinstance(v, Tensor)] if state is not None else []
        tensors += [v for n in ("SCB", "CB") if isinstance(v := getattr(parameter, n, None), Tensor)]
    return tensors


def _bytes(tensors: Iterable[Tensor]) -> Bytes:
    """Return the bytes by type; memory that tensors share counts once."""
    seen: dict[int, tuple[str, int]] = {}
    for tensor in tensors:
        for part in parts(tensor):
            seen[part.data_ptr()] = (_name(part), part.nbytes)
    count: Counter[str] = Counter()
    for name, size in seen.values():
        count[name] += size
    return dict(count)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
