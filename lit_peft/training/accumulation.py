"""Gradient accumulation that weights tokens, not batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_peft.training.lightning_internals import accumulates_further, trainer_of


class WeightedAccumulation:
    """Makes accumulated gradients those of the mean over all tokens (or examples) of their batches.

    Lightning averages the gradients of the batches, but a batch with few tokens should count less than one with many. A
    mixin of `BaseLM`. Each batch is weighted relative to the first one, since the number of tokens of all batches is
    known only after the last; then the sum is divided by it:

        gradient = (Σ w_i / w_1 · g_i / n) · (n · w_1 / Σ w_i)

    Where the strategy accumulates gradients itself (DeepSpeed), batches count equally.
    """

    _first_weight: Tensor | None = None
    _total_weight: Tensor | None = None
    _scale: Tensor | None = None

    def weight_batch(self, weight: Tensor) -> None:
        """Note the weight of the batch whose backward pass comes next, over all processes."""
        trainer: Any = trainer_of(self)  # type: ignore[arg-type]
        if trainer.accumulate_grad_batches == 1 or trainer.strategy.handles_gradient_accumulation:
            self._scale = None
            return
        if self._first_weight is None or self._total_weight is None:
            self._first_weight, self._total_weight = weight.clamp(min=1), torch.zeros_like(weight)
        self._total_weight = self._total_weight + weight
        self._scale = weight / self._first_weight

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of a batch, weighted relative to the first batch of the optimizer step."""
        weighted = loss if self._scale is None else loss * self._scale.to(loss.dtype)
        super().backward(weighted, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def on_after_backward(self) -> None:
        """Divide the gradients of the last batch of an optimizer step by the weight of all."""
        trainer: Any = trainer_of(self)  # type: ignore[arg-type]
        if self._scale is None or accumulates_further(trainer):
            return
        assert self._first_weight is not None and self._total_weight is not None
        factor = trainer.accumulate_grad_batches * self._first_weight / self._total_weight.clamp(min=1)
        for parameter in self.parameters():  # type: ignore[attr-defined]
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        self._first_weight = self._total_weight = self._scale = None
