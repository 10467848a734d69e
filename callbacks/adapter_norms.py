"""The norms of the trained parameters and of their gradients."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lit_peft.callbacks.tensors import trained
from torch import Tensor

from lit_peft.training.sharding import whole
from lit_peft.util.errors import LitPeftError


class AdapterNorms(Callback):
    """Logs the 2-norms of the trained parameters and of their gradients, before the gradients are clipped.

    It logs `grad_norm` and `param_norm` over all trained parameters and, with `per_adapter`, `grad_norm/NAME` and
    `param_norm/NAME` for each module with trained parameters (an adapted layer, the `down` layer of a bottleneck).

    Args:
        every_n_steps: optimizer steps between measurements; the Trainer's `log_every_n_steps` if unset.
        per_adapter: also log the norms of each module.

    Raises:
        LitPeftError: `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int | None = None, per_adapter: bool = False) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise LitPeftError(f"every_n_steps={every_n_steps}: give a positive number, or leave it unset.")
        self.every_n_steps, self.per_adapter = every_n_steps, per_adapter

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step % (self.every_n_steps or max(trainer.log_every_n_steps, 1)):  # type: ignore[attr-defined]
            return
        squares: dict[str, list[tuple[str, Tensor]]] = {"grad_norm": [], "param_norm": []}
        for name, parameter in trained(pl_module).items():
            owner = name.rpartition(".")[0]
            squares["param_norm"].append((owner, _square(parameter)))
            if parameter.grad is not None:
                squares["grad_norm"].append((owner, _square(parameter.grad)))
        for kind, members in squares.items():
            groups: dict[str, list[Tensor]] = {"": []}
            for owner, value in members:
                groups[""].append(value)
                if self.per_adapter:
                    groups.setdefault(owner, []).append(value)
            for owner, values in groups.items():
                if values:
                    key = f"{kind}/{owner}" if owner else kind
                    pl_module.log(key, torch.stack(values).sum().sqrt(), batch_size=1)


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(whole(tensor.detach()).float()).square()
