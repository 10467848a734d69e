"""Attention over packed rows, example by example, without a [length × length] mask.

transformers keeps the examples of a packed row apart by a dense mask, which shuts out the fast kernels and computes the
products between examples that the mask then removes. Here the attention function gets the examples' boundaries
(`cu_seq_lens_q`, the name that transformers' flash attention uses) and no mask:

- on a GPU in half precision, by torch's variable-length kernel (`torch.nn.attention.varlen`);
- on a GPU in float32, by flex attention with a block mask;
- elsewhere, one example after the other, by torch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.models.call_arguments import arguments
from lit_peft.models.transformers_internals import attention_implementation, supports_flash_attention
from lit_peft.nn.autocast import autocast_dtype
from lit_peft.nn.call_state import CallState
from lit_peft.util.errors import LitPeftError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn: Any = None  # type: ignore[no-redef]

# The name in transformers' tables of attention and mask functions. It is SDPA for all but packed rows.
NAME = "lit_peft_varlen"
Way = Literal["examples", "flex"]

# What a model may hand to its attention function and the kernels here do not have.
_UNKNOWN = ("softcap", "s_aux", "position_bias")
_LARGEST_HEAD = 256
_HALF = (torch.float16, torch.bfloat16)
# torch's kernel takes fewer key heads than heads from torch 2.12 on.
_GROUPED = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


class _Packed(CallState):
    """How the rows of the running call of a model are packed; None: they are not."""

    way: Way | None = None


_packed = _Packed()


def register() -> None:
    """Add the attention function `NAME` to transformers' tables. Doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def packed_rows(way: Way | None) -> Iterator[None]:
    """Tell `NAME` that the rows of the model's calls in the block are packed."""
    before, _packed.way = _packed.way, way
    try:
        yield
    finally:
        _packed.way = before


def boundaries(position_ids: Tensor) -> dict[str, Any]:
    """Return where the examples of packed rows begin and end, by the names of transformers' flash attention.

    Args:
        position_ids: positions that restart with each example, shape (rows, length).

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32 of shape (examples + 1,), over all rows end to end; `max_length_q`
        and `max_length_k`, the tokens of the longest example.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    ends = F.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(position_ids.max()) + 1
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def way_for(model: Any) -> Way | None:
    """Return how `NAME` can compute a model's packed rows on the device where it is; None: not at all.

    A model qualifies if transformers can run it with flash attention: its layers then tell their attention function all
    that a dense mask would, such as the window.
    """
    config = model.config.get_text_config()
    if not supports_flash_attention(model) or "kwargs" not in arguments(model):
        return None
    if getattr(config, "attention_dropout", 0.0):
        return None
    if model.device.type != "cuda":
        return "examples"
    dtype = autocast_dtype(model.device) or model.dtype
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    fits = (
        varlen_attn is not None and size <= _LARGEST_HEAD and torch.cuda.get_device_capability(model.device) >= (8, 0)
    )
    return "examples" if dtype in _HALF and fits else "flex"


def uses_varlen(model: Any) -> bool:
    """Return whether `NAME` is the model's attention function."""
    return attention_implementation(model.config) == NAME


def _mask(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if _packed.way == "examples":
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if _packed.way is None else "flex_attention"](*args, **kwargs)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each token to those before it in its example; an attention function of transformers.

    Args:
        module: the attention module that calls.
        query: shape (rows, heads, length, d).
        key: shape (rows, key heads, length, d); the number of heads is a multiple of that of the key heads.
        value: as `key`.
        attention_mask: None for packed rows; with a mask, the call goes to SDPA or flex attention.
        dropout: none is supported for packed rows.
        scaling: factor of the products; 1 / √d if None.
        cu_seq_lens_q: the boundaries of the examples, see `boundaries`; None: the rows are not packed.
        max_length_q: the tokens of the longest example.
        sliding_window: how many tokens each token attends to, itself included; None: all before it.
        **kwargs: what else the module hands over.

    Returns:
        Shape (rows, length, heads, d), and None.

    Raises:
        LitPeftError: the module needs something that packed rows do not have here.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = "sdpa" if attention_mask is None or isinstance(attention_mask, Tensor) else "flex_attention"
        kwargs.update(dropout=dropout, scaling=scaling, sliding_window=sliding_window)
        out: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[name](
            module, query, key, value, attention_mask, **kwargs
        )
        return out
    extra = next((name for name in _UNKNOWN if kwargs.get(name) is not None), "dropout" if dropout else None)
    if extra is not None:
        raise LitPeftError(
            f"data.packing is set, and {type(module).__name__} computes attention with {extra}, which the kernels for "
            "packed rows do not have: set model.attn_implementation to 'sdpa', or 'eager' if that does not have it."
        )
    rows, heads, length, _ = query.shape
    dtype = autocast_dtype(query.device) or query.dtype
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value))
    if query.is_cuda:
        longest = length if max_length_q is None else max_length_q
        found = _by_kernel(query, key, value, cu_seq_lens_q, longest, scaling, sliding_window)
    else:
        found = _one_by_one(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    return found.view(rows, length, heads, -1), None


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of tokens end to end, each (tokens, heads, d), in one call of torch's kernel."""
    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if query.shape[1] != key.shape[1]:
        if _GROUPED:
            settings["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = varlen_attn(query, key, value, ends, ends, longest, longest, **settings)
    assert isinstance(out, Tensor)  # a tuple only where more is asked for
    return out


# The lengths are read, which a compiler cannot trace.
@torch.compiler.disable
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of tokens end to end, each (tokens, heads, d), with one call for each example."""
    grouped = query.shape[1] != key.shape[1]
    found = []
    for start, end in pairwise(ends.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        near = None
        if window is not None and end - start > window:
            near = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=near, is_causal=near is None, scale=scaling, enable_gqa=grouped
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)
