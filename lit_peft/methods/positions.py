"""Positions of an input's tokens when virtual tokens precede them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.models.architectures import is_causal, room_for
from lit_peft.models.call_arguments import arguments, by_name, cache_of
from lit_peft.util.errors import LitPeftError

# transformers' names of the argument that holds the number of earlier tokens.
_PAST_LENGTHS = ("cache_length", "past_key_values_length")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def left_padding(mask: Tensor) -> Tensor:
    """The number of padding tokens before each row's text: (batch, length) → (batch, 1)."""
    return (mask.cumsum(1) == 0).sum(1, keepdim=True)


def count_positions(attention_mask: Tensor) -> Tensor:
    """Count positions from 0 over the tokens that are not padding.

    Args:
        attention_mask: 1 or true for a token, 0 or false for padding, shape (batch, length).

    Returns:
        Positions, shape (batch, length). Padding on the left has position 0.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def check_length(num_tokens: int, num_virtual_tokens: int, max_positions: int | None) -> None:
    """Check that the model has a position for each token.

    Args:
        num_tokens: the length of the input.
        num_virtual_tokens: the number of positions that virtual tokens take.
        max_positions: the number of positions that the model has; None if it has no limit.

    Raises:
        LitPeftError: there are not enough positions.
    """
    if max_positions is not None and num_tokens + num_virtual_tokens > max_positions:
        raise LitPeftError(
            f"The input has {num_tokens} tokens and {num_virtual_tokens} virtual tokens, which is more than the "
            f"{max_positions} positions of the model: shorten the texts to {max_positions - num_virtual_tokens} tokens "
            "(data.max_length)."
        )


class ShiftPositions:
    """Forward pre-hooks that add the length of a prefix to the positions of the tokens.

    They are for models with absolute or rotary positions, and act on the table of positions, on embeddings that count
    positions themselves, or on a decoder that takes `position_ids`.

    Args:
        num_virtual_tokens: the length of the prefix.
        mode: how a decoder's positions are counted if it is given none. `mask` counts only the tokens that the
            attention mask shows, `peft` counts padding too.
    """

    def __init__(self, num_virtual_tokens: int, mode: str) -> None:
        self.num_virtual_tokens, self.mode = num_virtual_tokens, mode
        self.max_positions: int | None = None

    def attach(self, attachment: Attachment, owner: str, attention: str) -> None:
        """Register the hook that suits the model. Models with relative positions need none.

        Args:
            attachment: makes and records the changes.
            owner: path of the model that has the prefix; empty for the whole model.
            attention: path of its first attention.

        Raises:
            LitPeftError: the prefix takes all positions that the model has.
        """
        model = attachment.model
        module = model.get_submodule(owner)
        self.max_positions = room_for(self.num_virtual_tokens, module, model)
        parent = f"{owner}." if owner else ""
        embeddings = getattr(module, "embeddings", None)
        names = arguments(embeddings) if isinstance(embeddings, nn.Module) else ()
        table = getattr(module, "embed_positions", None)
        table_arguments = arguments(table) if isinstance(table, nn.Module) else ()
        if "position_ids" not in table_arguments and any(name in table_arguments for name in _PAST_LENGTHS):
            attachment.forward_pre_hook(f"{parent}embed_positions", self.shift_embeddings, with_kwargs=True)
        elif isinstance(table, nn.Module):
            attachment.forward_pre_hook(f"{parent}embed_positions", self.shift_table, with_kwargs=True)
        elif any(name in names for name in _PAST_LENGTHS):
            attachment.forward_pre_hook(f"{parent}embeddings", self.shift_embeddings, with_kwargs=True)
        elif _attends_backward(model.get_submodule(attention), module) and "position_ids" in arguments(module):
            attachment.forward_pre_hook(owner, self.shift_decoder, with_kwargs=True)

    def check(self, position_ids: Tensor | None, num_tokens: int) -> None:
        """Check that the model has a position for each token.

        Args:
            position_ids: positions of any shape; None if the model counts them. Only those on a CPU are read, because
                reading others would wait for the device.
            num_tokens: the length of the input.

        Raises:
            LitPeftError: there are not enough positions.
        """
        on_cpu = position_ids is not None and position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and position_ids is not None and position_ids.numel():
            num_tokens = int(position_ids.max()) + 1
        check_length(num_tokens, self.num_virtual_tokens, self.max_positions)

    def shift_table(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Forward pre-hook of a table of positions, which is called with `position_ids` of shape (..., length)."""
        values = by_name(module, args, kwargs)
        ids = values["position_ids"]
        self.check(ids, ids.shape[-1])
        values["position_ids"] = torch.where(ids < 0, ids, ids + self.num_virtual_tokens)
        return (), values

    def shift_embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Forward pre-hook of embeddings that count positions from the number of earlier tokens."""
        values = by_name(module, args, kwargs)
        ids = values.get("position_ids")
        self.check(ids, _tokens(values).shape[1])
        if ids is not None:
            values["position_ids"] = ids + self.num_virtual_tokens
        else:
            name = next(name for name in _PAST_LENGTHS if name in arguments(module))
            values[name] = values.get(name, 0) + self.num_virtual_tokens
        return (), values

    def shift_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Forward pre-hook of a decoder. Without `position_ids` it would count from the length of its cache."""
        values = by_name(module, args, kwargs)
        ids = values.get("position_ids")
        if ids is None:
            tokens, mask = _tokens(values), _shown(values.get("attention_mask"))
            if self.mode == "mask" and mask is not None:
                ids = count_positions(mask)[:, -tokens.shape[1] :]
            else:
                cache = cache_of(values)
                past = 0 if cache is None else cache.get_seq_length()
                ids = torch.arange(tokens.shape[1], device=tokens.device)[None] + past
        self.check(ids, ids.shape[-1])
        values["position_ids"] = ids + self.num_virtual_tokens
        return (), values


def _shown(mask: Any) -> Tensor | None:
    """Return which tokens an attention mask shows, (batch, tokens); None if it does not say.

    A model that reads images may give its decoder finished masks, one for each kind of layer.
    """
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last >= 0


def _attends_backward(attention: Any, module: Any) -> bool:
    """Whether an attention sees only the tokens before each token: what it says itself, or what such a model does."""
    said = getattr(attention, "is_causal", None)
    return is_causal(getattr(module, "config", None)) if said is None else bool(said)


def _tokens(values: dict[str, Any]) -> Tensor:
    """The token ids, (batch, length), or the embeddings, (batch, length, hidden size), that a call is given."""
    ids = values.get("input_ids")
    tokens: Tensor = values["inputs_embeds"] if ids is None else ids
    return tokens
