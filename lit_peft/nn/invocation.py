"""Activated LoRA: an update that acts from the last invocation tokens on (Greenewald et al. 2025, arXiv:2504.12397).

The tokens before the invocation are computed by the base alone, so that keys and values that the base has cached for
them stay valid.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.call_state import CallState
from lit_peft.nn.lora import LoRALinear
from lit_peft.nn.torch_internals import backward_is_running
from lit_peft.util.errors import LitPeftError


@dataclass
class _Past:
    """What the next tokens of cached rows need to know: whether a row is active, and its last tokens."""

    active: Tensor
    tail: Tensor


class _Call(CallState):
    """The mask of the forward that runs, what it leaves to the next tokens, and what is known of caches."""

    mask: Tensor | None = None
    past: _Past | None = None
    caches: WeakKeyDictionary[Any, _Past] | None = None


class Invocation:
    """Finds the tokens of a batch from which on an update acts.

    Args:
        tokens: the ids of the invocation tokens.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.call = _Call()
        # For layers that the backward pass computes again, maybe in a thread of its own.
        self.mask_for_backward: Tensor | None = None
        self.was_seen = False

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Invocation.__init__(self, state["tokens"])

    def mask(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return which tokens the update acts on: those from the start of the last invocation of their example on.

        Args:
            ids: (batch, length) token ids.
            positions: (batch, length) position ids, which start again where a packed row begins another example.

        Returns:
            (batch, length), True for active tokens.
        """
        count, index = len(self.tokens), torch.arange(ids.shape[1], device=ids.device)
        example = torch.zeros_like(ids)
        if positions is not None and positions.shape[-1] == ids.shape[1] > 1 and positions.dim() == 2:
            example[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).cumsum(1)
        starts = torch.zeros_like(ids, dtype=torch.bool)
        if ids.shape[1] >= count:
            windows = ids.unfold(1, count, 1) == torch.tensor(self.tokens, device=ids.device)
            whole = example[:, count - 1 :] == example[:, : ids.shape[1] - count + 1]
            starts[:, : windows.shape[1]] = windows.all(-1) & whole
        # The last start of each example, -1 without one.
        last = torch.full_like(ids, -1).scatter_reduce(1, example, torch.where(starts, index, -1), "amax")
        own = last.gather(1, example)
        return (own >= 0) & (index >= own)

    # The compiler would not keep what this leaves for the layers.
    @torch.compiler.disable
    def begin(self, ids: Tensor, positions: Tensor | None, cache: Any, continues: bool, training: bool) -> None:
        """Find the active tokens of a batch, before the model computes it.

        Args:
            ids: (batch, length) token ids.
            positions: (batch, length) position ids; None if the model counts.
            cache: the cache of keys and values; None without one.
            continues: whether the cache has the beginning of the rows.
            training: whether the model is in training mode.
        """
        caches = self.call.caches = WeakKeyDictionary() if self.call.caches is None else self.call.caches
        past = caches.get(cache) if continues else None
        # Without a past, the base alone or another adapter computed what is cached.
        mask = self.mask(ids, None if continues else positions) if past is None else self._continued(ids, past)
        seen = ids if past is None else torch.cat([_rows(past.tail, len(ids)), ids], 1)
        self.call.mask, tail = mask, seen[:, max(0, seen.shape[1] - len(self.tokens) + 1) :]
        self.call.past = _Past(mask[:, -1], tail)
        if cache is not None:
            caches[cache] = self.call.past
        if torch.is_grad_enabled():
            self.mask_for_backward = mask
            if training and not self.was_seen:
                self._check_first(mask)

    @torch.compiler.disable
    def end(self, cache: Any, outputs: Iterable[Any]) -> None:
        """Remember what the model's outputs need: a cache, maybe one that it made, and a backward pass.

        Args:
            cache: the cache that the model returned; None without one.
            outputs: what the model returned.
        """
        if cache is not None and self.call.past is not None and self.call.caches is not None:
            self.call.caches[cache] = self.call.past
        mask, self.call.mask = self.call.mask, None
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad:
                # The backward pass of this forward begins at an output, before it computes layers again.
                output.register_hook(partial(self._begin_backward, mask))

    def _begin_backward(self, mask: Tensor | None, gradient: Tensor) -> None:
        self.mask_for_backward = mask

    def _check_first(self, mask: Tensor) -> None:
        self.was_seen = True
        if not mask.any():
            warnings.warn(
                f"No row of the first training batch has the alora_invocation_tokens {self.tokens}, so the update gets "
                "no gradient from it: check that the prompts contain them, as the tokenizer writes them.",
                stacklevel=2,
            )

    def _continued(self, ids: Tensor, past: _Past) -> Tensor:
        """The active tokens of rows whose beginning is cached: a row stays as it was unless it is invoked again."""
        active, tail = _rows(past.active, len(ids))[:, None], _rows(past.tail, len(ids))
        if ids.shape[1] == 1:
            # What the model generates does not invoke.
            return active
        found = self.mask(torch.cat([tail, ids], 1))[:, tail.shape[1] :]
        return torch.where(found.any(1, keepdim=True), found, active.expand_as(found))

    def current(self, x: Tensor) -> Tensor:
        """Return the mask for a layer's input x, with a last dimension of 1.

        Raises:
            LitPeftError: no forward of the model runs, or x has another shape than the batch.
        """
        mask = self.mask_for_backward if backward_is_running() else self.call.mask
        if mask is None:
            raise LitPeftError(
                "A layer with alora_invocation_tokens was called outside of a forward of the whole model, which finds "
                "the tokens in input_ids: call the model."
            )
        if x.shape[:-1] == mask.shape:
            return mask.unsqueeze(-1)
        if x.dim() == 2 and len(x) == mask.numel():
            return mask.reshape(-1, 1)
        raise LitPeftError(
            f"A layer with alora_invocation_tokens got an input of shape {tuple(x.shape)}, which is not one of the "
            f"batch's {tuple(mask.shape)} tokens: name layers of the decoder in target_modules."
        )


def _rows(values: Tensor, count: int) -> Tensor:
    """Repeat the values of rows for beams, which follow each other."""
    if len(values) != count and count % len(values) == 0:
        return values.repeat_interleave(count // len(values), 0)
    return values


class InvokedLoRALinear(LoRALinear):
    """`h_t = W x_t + b`, and for active tokens t also `s · B A dropout(x_t)`.

    Args:
        base_layer: the layer to adapt.
        invocation: finds the active tokens.
        **settings: see `LoRALayer`.

    Shapes:
        input (batch, length, in_features) → output (batch, length, out_features)
    """

    def __init__(self, base_layer: nn.Module, *, invocation: Invocation, **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        self.invocation = invocation

    def check_kind(self) -> None:
        raise LitPeftError(
            "A LoRA with alora_invocation_tokens cannot be merged, because it acts on some tokens only: keep the "
            "adapter."
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = self.base_layer(x, *args, **kwargs)
        mask = self.invocation.current(x)
        dropped = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        return out + torch.where(mask, self.update(dropped), 0).to(out.dtype)
