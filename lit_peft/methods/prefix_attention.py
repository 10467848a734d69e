"""Put a prefix in front of the keys and values of an attention layer.

The prefix is not stored in the model's KV cache; each attention adds it to the keys and values from the cache. So beam
search, cropping and static caches need no special case, and checkpointed layers, which run without a cache, use the
prefix too. transformers computes attention in three ways, each of which needs its own hook:

- Most models look up an attention function by the name in their config. The attention gets a config with the name of
  `attention_with_prefix`, which adds the prefix and calls the original function.
- BLOOM, Falcon and MPT compute attention in their own code and read keys and values from a cache. They get a cache that
  adds the prefix.
- DeBERTa computes attention in its own code without a cache. Hooks on its key and value projections add the prefix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.disentangled_prefix import DisentangledAttention
from lit_peft.methods.layer_prefix import LayerPrefix
from lit_peft.methods.positions import left_padding
from lit_peft.methods.prefix_in_cache import DistancePrefix, PrefixInCache
from lit_peft.models.call_arguments import arguments, by_name, cache_of
from lit_peft.models.transformers_internals import (
    AttentionConfig,
    attention_implementation,
    eager_attention,
    uses_attention_interface,
)
from lit_peft.nn.call_state import CallState
from lit_peft.util.errors import LitPeftError

_FUNCTION = "lit_peft_prefix"
_OTHERWISE = "use another method, e.g. LoRA or PromptTuning"


def attach_layer_prefix(
    attachment: Attachment,
    path: str,
    prefix: LayerPrefix,
    relative: nn.Module | None,
    shifts_positions: bool,
    own_attention: str | None,
) -> None:
    """Put a prefix in front of the keys and values of one attention module.

    Args:
        attachment: makes and records the changes.
        path: path of the attention module.
        prefix: its prefix.
        relative: the attention module that has the table of relative positions for all layers (T5); None if no module
            has one.
        shifts_positions: whether the positions of the input's tokens start after the prefix.
        own_attention: how the module takes a prefix if it computes attention in its own code: see `Architecture`.

    Raises:
        LitPeftError: the module computes attention in a way that is not supported.
    """
    module: Any = attachment.model.get_submodule(path)
    problem = _no_way_in(module, shifts_positions)
    if problem is not None:
        raise LitPeftError(f"{path} ({type(module).__name__}) {problem}.")
    if hasattr(module, "disentangled_attention_bias"):
        DisentangledAttention(prefix, module).attach(attachment, path)
    elif "alibi" in arguments(module):
        attachment.forward_pre_hook(path, PrefixInCache(prefix), with_kwargs=True)
    elif own_attention == "distance":
        attachment.forward_pre_hook(path, DistancePrefix(prefix), with_kwargs=True)
    elif own_attention == "cache":
        attachment.forward_pre_hook(path, PrefixInCache(prefix), with_kwargs=True)
    elif uses_attention_interface(module):
        config = PrefixedConfig(prefix, module, relative, shifts_positions)
        attachment.set(path, "config", config)
        if relative is not None:
            attachment.forward_pre_hook(path, config.record_cached_tokens, with_kwargs=True)
    else:
        raise LitPeftError(
            f"{path} ({type(module).__name__}) computes attention in its own code, to which no prefix can be added: "
            f"{_OTHERWISE}."
        )


def _no_way_in(module: Any, shifts_positions: bool) -> str | None:
    """Why an attention that uses transformers' interface can take no prefix, and what to do; None if it can."""
    if shifts_positions and hasattr(getattr(module, "indexer", None), "build_block_mask"):
        return (
            "selects blocks of keys by their positions, which a prefix shifts: set positions='adapterhub', which "
            f"leaves them unchanged, or {_OTHERWISE}"
        )
    if hasattr(module, "experts"):
        return f"routes its queries through experts, and repeats its keys for them: {_OTHERWISE}"
    if hasattr(module, "keep_window_size"):
        return f"computes its mask from the values (dynamic mask), which would leave the prefix out: {_OTHERWISE}"
    return None


class _AttentionCall(CallState):
    past = 0


class PrefixedConfig(AttentionConfig):
    """A config for one attention module that selects `attention_with_prefix` and holds what it needs.

    Args:
        prefix: the layer's prefix.
        module: the attention module.
        relative: the attention module that has the table of relative positions (T5); None if no module has one.
        shifts_positions: whether the positions of the input's tokens start after the prefix.
    """

    def __init__(self, prefix: LayerPrefix, module: nn.Module, relative: Any, shifts_positions: bool) -> None:
        super().__init__(module.config, _FUNCTION)
        _register()
        self.prefix, self.relative, self.shifts_positions = prefix, relative, shifts_positions
        self.call = _AttentionCall()
        self.eager = eager_attention(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The config may be unpickled in a new process, where the function is not registered yet.
        _register()
        vars(self).update(state)

    def record_cached_tokens(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention that records the number of cached tokens.

        With a static cache this number cannot be read from the shape of the keys.
        """
        cache = cache_of(by_name(module, args, kwargs))
        self.call.past = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))

    def extend_bias(self, bias: Tensor, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Extend T5's relative position bias by v positions in front of the first key.

        AdapterHub shifts the positions of the keys by v, but not those of the queries.

        Args:
            bias: shape (batch or 1, heads, queries, keys).
            query: shape (batch, heads, queries, head_dim).
            key: shape (batch, heads, keys, head_dim).
            mask: the attention mask, shape (batch, 1, queries, keys). The prefix stands before each row's first token,
                not before the padding on its left.

        Returns:
            The bias, shape (batch or 1, heads, queries, v + keys).
        """
        length, num_queries = self.prefix.length, query.shape[2]
        if self.relative is None:
            return F.pad(bias, (length, 0))
        num_keys = length + key.shape[2]
        past = self.call.past + (length if self.shifts_positions else 0)
        full_bias = self.relative.compute_bias(num_queries, num_keys, device=query.device, past_seen_tokens=past)
        if not self.shifts_positions:
            return full_bias.to(bias.dtype)
        prefix_bias = full_bias[..., :length].to(bias.dtype)
        if mask is not None and num_queries > 1:
            # A query is as far from the prefix as it is in a row without the padding.
            padding = left_padding(mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] >= 0)
            rows = (torch.arange(num_queries, device=mask.device)[None] - padding).clamp(min=0)
            prefix_bias = prefix_bias[0][:, rows].transpose(0, 1)
        batch = max(bias.shape[0], prefix_bias.shape[0])
        return torch.cat([prefix_bias.expand(batch, -1, -1, -1), bias.expand(batch, -1, -1, -1)], dim=-1)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_FUNCTION, attention_with_prefix)


def attention_with_prefix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attention function for transformers' `AttentionInterface`: adds the prefix and calls the model's own function.

    Args:
        module: an attention module whose config is a `PrefixedConfig`.
        query: shape (batch, heads, queries, head_dim).
        key: shape (batch, key-value heads, keys, head_dim).
        value: shape (batch, key-value heads, keys, head_dim).
        attention_mask: shape (batch or 1, heads or 1, queries, keys); None if there is no mask.
        **kwargs: other arguments of the model's attention function.

    Returns:
        What the model's attention function returns.

    Raises:
        LitPeftError: the model's attention function uses masks of another kind.
    """
    from transformers import AttentionInterface

    config: PrefixedConfig = module.config
    implementation, prefix = attention_implementation(config.config), config.prefix
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = config.extend_bias(kwargs["position_bias"], query, key, attention_mask)
    attention_mask = _sparse_mask(module, query, key, attention_mask, implementation, kwargs)
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and num_queries > 1 and implementation == "sdpa":
        # Without a mask, sdpa aligns the first query with the first key, which is now the first virtual token.
        attention_mask = query.new_ones(num_queries, num_keys, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise LitPeftError(
                f"attn_implementation={implementation!r} does not support prefixes: load the model with "
                "attn_implementation='sdpa'."
            )
        attention_mask = prefix.extend_mask(attention_mask)
    interface: Any = AttentionInterface()
    function = interface.get_interface(implementation, config.eager)
    groups = getattr(module, "num_key_value_groups", 1)
    if prefix.heads == key.shape[1]:
        key, value = prefix.extend(key, value)
        return function(module, query, key, value, attention_mask, **kwargs)
    # `per_query_head`: keys and values are repeated here, so the function must not repeat them again.
    key, value = prefix.extend(key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
    module.num_key_value_groups = 1
    try:
        return function(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.num_key_value_groups = groups


def _sparse_mask(
    module: Any, query: Tensor, key: Tensor, mask: Any, implementation: str | None, kwargs: dict[str, Any]
) -> Any:
    """Return the mask of an attention that selects keys (DeepSeek V3.2, MiniMax M3), which shows only these.

    Such a module extends its mask itself if its config names a function that it knows, and otherwise passes on the
    indices of the selected keys. The prefix is not among the keys, and stays visible.
    """
    tokens, blocks = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if tokens is None and blocks is None:
        return mask
    if implementation not in ("eager", "sdpa"):
        raise LitPeftError(
            f"attn_implementation={implementation!r} selects keys by their index, which a prefix would shift: load the "
            "model with attn_implementation='sdpa'."
        )
    if blocks is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
        positions = positions if positions.dim() > 1 else positions[None]
        positions = positions.expand(query.shape[0], -1)
        return module.indexer.build_block_mask(blocks, mask, key.shape[2], query.dtype, query.device, positions)
    shape = (query.shape[0], query.shape[2], key.shape[2])
    hidden = torch.ones(shape, dtype=torch.bool, device=query.device).scatter(-1, tokens.long(), False)[:, None]
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(query.dtype).min)
