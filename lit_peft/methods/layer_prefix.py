"""A prefix in one forward of the model, and in one of its attention layers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.prefix import Prefix


class StartPrefix:
    """Forward pre-hook of a model that computes the prefix once per forward, outside checkpointed layers.

    Args:
        prefix: the prefix of all layers.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.prefix.start()


class LayerPrefix:
    """The prefix of one attention layer.

    Args:
        prefix: the prefix of all layers.
        index: the layer's index in it.
    """

    def __init__(self, prefix: Prefix, index: int) -> None:
        self.prefix, self.slot = prefix, prefix.slots[index]

    @property
    def heads(self) -> int:
        """The number of heads that have keys in the prefix."""
        return self.slot.shape[0]

    @property
    def length(self) -> int:
        """The number v of virtual tokens."""
        return self.prefix.num_virtual_tokens

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix in front of keys and values.

        Args:
            key: keys, shape (batch, heads, tokens, head_dim).
            value: values, shape (batch, heads, tokens, head_dim).

        Returns:
            Keys and values, shape (batch, heads, v + tokens, head_dim) each.
        """
        return self.prefix.extend(self.slot, key, value)

    def extend_mask(self, mask: Tensor) -> Tensor:
        """Extend an attention mask so that every query attends to the prefix.

        Args:
            mask: shape (..., keys). A 4-D floating-point mask is additive; any other is 1 or true where a query attends
                to a key.

        Returns:
            The mask, shape (..., v + keys).
        """
        return F.pad(mask, (self.length, 0), value=0 if mask.is_floating_point() and mask.dim() == 4 else 1)
