"""Positions behind a prefix: the real tokens' positions start after those of the virtual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.models.architectures import room_for
from lit_peft.models.call_arguments import arguments, by_name, cache_of
from lit_peft.util.errors import LitPeftError

# What transformers calls the argument that says how many tokens came before.
_PAST_LENGTHS = ("cache_length", "past_key_values_length")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class ShiftPositions:
    """Forward pre-hooks that move the real tokens' positions behind the prefix.

    They act where a model has absolute or rotary positions: on the table of positions, on embeddings that count the
    positions themselves, or on a decoder that takes `position_ids`.

    Args:
        length: v, the number of virtual tokens.
        mode: `mask` counts the tokens that the attention mask shows, `peft` counts the padding too.
    """

    def __init__(self, length: int, mode: str) -> None:
        self.length, self.mode = length, mode
        self.limit: int | None = None

    def attach(self, model: nn.Module, attachment: Attachment, owner: str, attention: str) -> None:
        """Register the hook that fits the model at the path `owner`, whose first attention is at `attention`."""
        module = model.get_submodule(owner)
        self.limit = room_for(self.length, module, model)
        inside = f"{owner}." if owner else ""
        embeddings = getattr(module, "embeddings", None)
        names = arguments(embeddings) if isinstance(embeddings, nn.Module) else ()
        if isinstance(getattr(module, "embed_positions", None), nn.Module):
            attachment.forward_pre_hook(f"{inside}embed_positions", self.shift_table, with_kwargs=True)
        elif any(name in names for name in _PAST_LENGTHS):
            attachment.forward_pre_hook(f"{inside}embeddings", self.shift_embeddings, with_kwargs=True)
        elif getattr(model.get_submodule(attention), "is_causal", False) and "position_ids" in arguments(module):
            attachment.forward_pre_hook(owner, self.shift_decoder, with_kwargs=True)

    def check(self, position_ids: Tensor | None, length: int) -> None:
        """Refuse an input longer than the model's table of positions.

        Args:
            position_ids: the positions, if they are known. They are read on a CPU only, to wait for no device.
            length: the number of tokens.

        Raises:
            LitPeftError: there are not enough positions.
        """
        known = position_ids is not None and position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if known and position_ids is not None and position_ids.numel():
            length = int(position_ids.max()) + 1
        if self.limit is not None and length + self.length > self.limit:
            raise LitPeftError(
                f"The input has {length} tokens and the prefix {self.length}, but the model has {self.limit} "
                f"positions: shorten the texts to {self.limit - self.length} tokens (data.max_length)."
            )

    def shift_table(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Pre-hook of a module that is called with the positions it embeds."""
        values = by_name(module, args, kwargs)
        ids = values["position_ids"]
        self.check(ids, ids.shape[-1])
        values["position_ids"] = torch.where(ids < 0, ids, ids + self.length)
        return (), values

    def shift_embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Pre-hook of a module that counts positions itself, after those of an argument."""
        values = by_name(module, args, kwargs)
        tokens = values["input_ids"] if values.get("input_ids") is not None else values["inputs_embeds"]
        self.check(values.get("position_ids"), tokens.shape[1])
        if values.get("position_ids") is not None:
            values["position_ids"] = values["position_ids"] + self.length
        else:
            name = next(name for name in _PAST_LENGTHS if name in arguments(module))
            values[name] = values.get(name, 0) + self.length
        return (), values

    def shift_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Pre-hook of a decoder that takes `position_ids`; without any, it would count them from its cache's length."""
        values = by_name(module, args, kwargs)
        ids = values.get("position_ids")
        if ids is None:
            tokens = values.get("input_ids")
            tokens = values["inputs_embeds"] if tokens is None else tokens
            length, mask = tokens.shape[1], values.get("attention_mask")
            if self.mode == "mask" and isinstance(mask, Tensor) and mask.dim() == 2:
                ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                cache = cache_of(values)
                past = 0 if cache is None else cache.get_seq_length()
                ids = torch.arange(length, device=tokens.device)[None] + past
        self.check(ids, ids.shape[-1])
        values["position_ids"] = ids + self.length
        return (), values
