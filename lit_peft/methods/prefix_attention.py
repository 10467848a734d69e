"""Put a prefix in front of the keys and values of an attention layer.

The prefix is not stored in the model's KV cache; each attention adds it to the keys and values from the cache. So beam
search, cropping and static caches need no special case, and checkpointed layers, which run without a cache, use the
prefix too. transformers computes attention in three ways, each of which needs its own hook:

- Most models look up an attention function by the name in their config. The attention gets a config with the name of
  `attention_with_prefix`, which adds the prefix and calls the original function.
- BLOOM and Falcon compute attention in their own code and read keys and values from a cache. They get a cache that adds
  the prefix.
- DeBERTa computes attention in its own code without a cache. Hooks on its key and value projections add the prefix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.positions import left_padding
from lit_peft.models.call_arguments import CACHES, arguments, by_name, cache_of
from lit_peft.models.transformers_internals import (
    AttentionConfig,
    alibi_function,
    attention_implementation,
    eager_attention,
    uses_attention_interface,
)
from lit_peft.nn.call_state import CallState
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError

_FUNCTION = "lit_peft_prefix"
Call = tuple[tuple[Any, ...], dict[str, Any]]


def attach_layer_prefix(
    attachment: Attachment, path: str, prefix: LayerPrefix, relative: nn.Module | None, shifts_positions: bool
) -> None:
    """Put a prefix in front of the keys and values of one attention module.

    Args:
        attachment: makes and records the changes.
        path: path of the attention module.
        prefix: its prefix.
        relative: the attention module that has the table of relative positions for all layers (T5); None if no module
            has one.
        shifts_positions: whether the positions of the input's tokens start after the prefix.

    Raises:
        LitPeftError: the module computes attention in a way that is not supported.
    """
    module: Any = attachment.model.get_submodule(path)
    problem = _no_way_in(module)
    if problem is not None:
        raise LitPeftError(
            f"{path} ({type(module).__name__}) {problem}: use another method, e.g. LoRA or PromptTuning."
        )
    if hasattr(module, "disentangled_attention_bias"):
        DisentangledAttention(prefix, module).attach(attachment, path)
    elif "alibi" in arguments(module):
        attachment.forward_pre_hook(path, PrefixInCache(prefix), with_kwargs=True)
    elif uses_attention_interface(module):
        config = PrefixedConfig(prefix, module, relative, shifts_positions)
        attachment.set(path, "config", config)
        if relative is not None:
            attachment.forward_pre_hook(path, config.record_cached_tokens, with_kwargs=True)
    else:
        raise LitPeftError(
            f"{path} ({type(module).__name__}) computes attention in its own code, to which no prefix can be added: "
            "use another method, e.g. LoRA or PromptTuning."
        )


def _no_way_in(module: Any) -> str | None:
    """Why an attention that uses transformers' interface can take no prefix all the same; None if it can."""
    key_width = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    if key_width is not None and key_width != getattr(module, "v_head_dim", key_width):
        return "has keys and values of different widths, which a prefix does not have"
    if hasattr(module, "experts"):
        return "routes its queries through experts, and repeats its keys for them"
    if hasattr(module, "keep_window_size"):
        return "computes its mask from the values (dynamic mask), which would leave the prefix out"
    return None


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


class PrefixInCache:
    """Forward pre-hook of an attention module that is called with a mask, ALiBi's bias and a cache (BLOOM, Falcon).

    Args:
        prefix: the layer's prefix.
    """

    def __init__(self, prefix: LayerPrefix) -> None:
        self.prefix = prefix

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        values, length = by_name(module, args, kwargs), self.prefix.length
        mask, alibi = values["attention_mask"], values["alibi"]
        if mask is not None:
            values["attention_mask"] = self.prefix.extend_mask(mask)
        if alibi is not None:
            # ALiBi counts from 0 at the first key, so the prefix gets negative positions. Only differences matter to
            # the softmax.
            positions = torch.arange(-length, 0, device=alibi.device, dtype=alibi.dtype)
            build: Any = alibi_function(module)
            ones = torch.ones(1, 2, dtype=torch.long, device=alibi.device)
            bias = build(ones, module.num_heads, alibi.dtype)[:, :, 1:] * positions  # (heads, 1, v)
            if alibi.dim() == 3:
                prefix_alibi = bias.repeat(alibi.shape[0] // module.num_heads, 1, 1)
            else:
                prefix_alibi = bias.expand(alibi.shape[0], -1, -1, -1)
            values["alibi"] = torch.cat([prefix_alibi, alibi], dim=-1)
            if mask is not None and mask.shape[1] == module.num_heads:
                # Falcon adds ALiBi to its mask as well.
                prefix_mask = (bias * module.inv_norm_factor).expand(*mask.shape[:3], -1)
                values["attention_mask"] = torch.cat([prefix_mask.to(mask.dtype), mask], dim=-1)
        name = next(name for name in CACHES if name in arguments(module))
        values[name] = _PrefixedCache(self.prefix, values.get(name))
        return (), values


class _PrefixedCache:
    """Wraps a cache, or None, and returns keys and values with the prefix in front."""

    def __init__(self, prefix: LayerPrefix, cache: Any) -> None:
        self.prefix, self.cache = prefix, cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return self.prefix.extend(key, value)


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
