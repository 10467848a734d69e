"""A prefix for DeBERTa's attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.layer_prefix import LayerPrefix
from lit_peft.models.call_arguments import by_name
from lit_peft.nn.call_state import CallState

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _BiasCall(CallState):
    is_computing = False


class DisentangledAttention:
    """Hooks that add a prefix to DeBERTa's attention. The prefix has no relative positions.

    Args:
        prefix: the layer's prefix.
        module: the attention module.
    """

    def __init__(self, prefix: LayerPrefix, module: Any) -> None:
        self.prefix, self.module, self.call = prefix, module, _BiasCall()

    def attach(self, attachment: Attachment, path: str) -> None:
        """Register the hooks.

        Args:
            attachment: makes and records the changes.
            path: path of the attention module.
        """
        attachment.set(path, "disentangled_attention_bias", self.relative_bias)
        attachment.forward_pre_hook(path, self.extend_mask, with_kwargs=True)
        attachment.forward_hook(f"{path}.key_proj", self.extend_key)
        attachment.forward_hook(f"{path}.value_proj", self.extend_value)

    def extend_mask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Forward pre-hook of the attention that extends its mask."""
        values = by_name(module, args, kwargs)
        values["attention_mask"] = self.prefix.extend_mask(values["attention_mask"].bool())
        return (), values

    def extend_key(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the key projection: (batch, tokens, hidden size) → (batch, v + tokens, hidden size)."""
        return None if self.call.is_computing else self._extended(output, 0)

    def extend_value(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the value projection: (batch, tokens, hidden size) → (batch, v + tokens, hidden size)."""
        return self._extended(output, 1)

    def _extended(self, output: Tensor, part: int) -> Tensor:
        prefix = self.prefix.prefix.layer(self.prefix.slot, output)[part]
        return torch.cat([prefix.transpose(1, 2).flatten(2), output], dim=1)

    def relative_bias(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces the attention's `disentangled_attention_bias`: computes it without the prefix and pads it.

        Args:
            query: shape (batch · heads, queries, head_dim).
            key: shape (batch · heads, v + tokens, head_dim).
            *args: other arguments of the original method.
            **kwargs: other keyword arguments of the original method.

        Returns:
            The bias, shape (batch · heads, queries, v + tokens).
        """
        # The original may project the position embeddings with the key projection, which must not add the prefix.
        self.call.is_computing = True
        try:
            original = type(self.module).disentangled_attention_bias
            bias = original(self.module, query, key[:, self.prefix.length :], *args, **kwargs)
        finally:
            self.call.is_computing = False
        return F.pad(bias, (self.prefix.length, 0)) if isinstance(bias, Tensor) else bias
