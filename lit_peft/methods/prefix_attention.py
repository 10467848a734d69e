"""How a prefix reaches an attention layer.

The prefix never enters the model's KV cache: each attention puts it in front of what the cache holds. So beam search,
cropping and static caches need no special case, and checkpointed layers, which run without a cache, see the prefix too.
transformers computes attention in three ways, and there is a way in for each:

- through its table of attention functions: the attention's config names our function, which puts the prefix in front
  and calls the function that the model's config names;
- in the layer's own code, which asks a cache for the keys (BLOOM, Falcon): the cache's answer carries the prefix;
- in the layer's own code without a cache (DeBERTa): the outputs of the key and value projections carry it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.models.call_arguments import CACHES, arguments, by_name, cache_of
from lit_peft.models.transformers_internals import (
    AttentionConfig,
    alibi_function,
    attention_implementation,
    eager_attention,
    uses_attention_interface,
)
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError

_FUNCTION = "lit_peft_prefix"
Call = tuple[tuple[Any, ...], dict[str, Any]]


def put_prefix_at(
    attachment: Attachment, path: str, prefix: LayerPrefix, relative: nn.Module | None, shifts_positions: bool
) -> None:
    """Put a prefix in front of the keys and values of the attention at `path`.

    Args:
        attachment: records the changes.
        path: the attention's path.
        prefix: its prefix.
        relative: the attention that holds the stack's table of relative positions (T5), if there is one.
        shifts_positions: whether the real tokens' positions start behind the prefix.

    Raises:
        LitPeftError: the attention has code of its own that leaves no way in.
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
            attachment.forward_pre_hook(path, config.note_past, with_kwargs=True)
    else:
        raise LitPeftError(
            f"{path} ({type(module).__name__}) computes attention in its own code, where no prefix can be put in front "
            "of the keys and values: use another method, e.g. LoRA or PromptTuning."
        )


def _no_way_in(module: Any) -> str | None:
    """Why an attention that uses transformers' interface can take no prefix all the same; None if it can."""
    key_width = getattr(module, "qk_head_dim", None)
    if key_width is not None and key_width != getattr(module, "v_head_dim", key_width):
        return "has keys and values of different widths (latent attention), which a prefix does not have"
    if hasattr(module, "experts"):
        return "routes its queries through experts, and repeats its keys for them"
    if hasattr(module, "keep_window_size"):
        return "computes its mask from the values (dynamic mask), which would leave the prefix out"
    return None


class StartPrefix:
    """Forward pre-hook of a model: computes the prefix once for the pass, outside checkpointed layers."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.prefix.start()


class LayerPrefix:
    """The prefix of one attention layer: row `index` of a stack's prefix."""

    def __init__(self, prefix: Prefix, index: int) -> None:
        self.prefix, self.index = prefix, index

    @property
    def length(self) -> int:
        """v, the number of virtual tokens."""
        return self.prefix.num_virtual_tokens

    @property
    def heads(self) -> int:
        """The number of heads that the prefix has keys for."""
        return self.prefix.shapes[self.index][0]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix in front of keys and values, (batch, heads, tokens, head_dim) each."""
        return self.prefix.extend(self.index, key, value)

    def extend_mask(self, mask: Tensor) -> Tensor:
        """Let every query see the prefix.

        Args:
            mask: additive if it is 4-D and of floating point; otherwise 1 or true where a key is seen.
        """
        return F.pad(mask, (self.length, 0), value=0 if mask.is_floating_point() and mask.dim() == 4 else 1)


class PrefixedConfig(AttentionConfig):
    """An attention's config that names our attention function, and holds what that function needs."""

    def __init__(self, prefix: LayerPrefix, module: nn.Module, relative: Any, shifts_positions: bool) -> None:
        super().__init__(module.config, _FUNCTION)
        _register()
        self.prefix, self.relative, self.shifts_positions = prefix, relative, shifts_positions
        self.past = 0
        self.eager = eager_attention(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A spawned process has not registered the function yet.
        _register()
        vars(self).update(state)

    def note_past(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention: how many tokens the cache holds, which a static cache's size hides."""
        cache = cache_of(by_name(module, args, kwargs))
        self.past = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))

    def extend_bias(self, bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Extend T5's relative position bias, (1, heads, queries, keys), by the prefix just in front of the first key.

        AdapterHub moves the keys behind the prefix, and not the queries.
        """
        length, queries = self.prefix.length, query.shape[2]
        if self.relative is None:
            return F.pad(bias, (length, 0))
        keys = length + key.shape[2]
        past = self.past + (length if self.shifts_positions else 0)
        whole = self.relative.compute_bias(queries, keys, device=query.device, past_seen_tokens=past)
        if not self.shifts_positions:
            return whole.to(bias.dtype)
        return torch.cat([whole[..., :length].to(bias.dtype).expand(bias.shape[0], -1, -1, -1), bias], dim=-1)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_FUNCTION, attention_with_prefix)


def attention_with_prefix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """transformers' attention function for an attention whose config is a `PrefixedConfig`."""
    from transformers import AttentionInterface

    config: PrefixedConfig = module.config
    name, prefix = attention_implementation(config.config), config.prefix
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = config.extend_bias(kwargs["position_bias"], query, key)
    queries, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and queries > 1 and name == "sdpa":
        # Without a mask, sdpa lets the first query see the first key alone. With a prefix, a mask must say it.
        attention_mask = query.new_ones(queries, keys, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise LitPeftError(
                f"attn_implementation={name!r} takes no prefix: load the model with attn_implementation='sdpa'."
            )
        attention_mask = prefix.extend_mask(attention_mask)
    interface: Any = AttentionInterface()
    function = interface.get_interface(name, config.eager)
    groups = getattr(module, "num_key_value_groups", 1)
    if prefix.heads == key.shape[1]:
        key, value = prefix.extend(key, value)
        return function(module, query, key, value, attention_mask, **kwargs)
    key, value = prefix.extend(key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
    module.num_key_value_groups = 1
    try:
        return function(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.num_key_value_groups = groups


class PrefixInCache:
    """Forward pre-hook of an attention with its own code that takes a mask, ALiBi's bias and a cache."""

    def __init__(self, prefix: LayerPrefix) -> None:
        self.prefix = prefix

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        values, length = by_name(module, args, kwargs), self.prefix.length
        mask, alibi = values["attention_mask"], values["alibi"]
        if mask is not None:
            values["attention_mask"] = self.prefix.extend_mask(mask)
        if alibi is not None:
            # ALiBi counts from the first key; the prefix lies before it. Softmax sees differences alone.
            steps = torch.arange(-length, 0, device=alibi.device, dtype=alibi.dtype)
            build: Any = alibi_function(module)
            ones = torch.ones(1, 2, dtype=torch.long, device=alibi.device)
            columns = build(ones, module.num_heads, alibi.dtype)[:, :, 1:] * steps  # (heads, 1, v)
            if alibi.dim() == 3:
                left = columns.repeat(alibi.shape[0] // module.num_heads, 1, 1)
            else:
                left = columns.expand(alibi.shape[0], -1, -1, -1)
            values["alibi"] = torch.cat([left, alibi], dim=-1)
            if mask is not None and mask.shape[1] == module.num_heads:
                # Falcon has ALiBi in the mask as well.
                added = (columns * module.inv_norm_factor).expand(*mask.shape[:3], -1)
                values["attention_mask"] = torch.cat([added.to(mask.dtype), mask], dim=-1)
        name = next(name for name in CACHES if name in arguments(module))
        values[name] = _PrefixedCache(self.prefix, values.get(name))
        return (), values


class _PrefixedCache:
    """A cache that answers with the prefix in front of what it holds."""

    def __init__(self, prefix: LayerPrefix, cache: Any) -> None:
        self.prefix, self.cache = prefix, cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return self.prefix.extend(key, value)


class DisentangledAttention:
    """DeBERTa's attention: the prefix comes out of the key and value projections, and has no relative position."""

    def __init__(self, prefix: LayerPrefix, module: Any) -> None:
        self.prefix, self.module, self.active = prefix, module, True

    def attach(self, attachment: Attachment, path: str) -> None:
        """Register the hooks at the attention's path."""
        attachment.set(path, "disentangled_attention_bias", self.relative_bias)
        attachment.forward_pre_hook(path, self.extend_mask, with_kwargs=True)
        attachment.forward_hook(f"{path}.key_proj", self.extend_key)
        attachment.forward_hook(f"{path}.value_proj", self.extend_value)

    def extend_mask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Forward pre-hook of the attention."""
        values = by_name(module, args, kwargs)
        values["attention_mask"] = self.prefix.extend_mask(values["attention_mask"].bool())
        return (), values

    def extend_key(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the key projection."""
        return self._extended(output, 0) if self.active else None

    def extend_value(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the value projection."""
        return self._extended(output, 1)

    def _extended(self, output: Tensor, part: int) -> Tensor:
        prefix = self.prefix.prefix.layer(self.prefix.index, output)[part]
        return torch.cat([prefix.transpose(1, 2).flatten(2), output], dim=1)

    def relative_bias(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes the place of the attention's `disentangled_attention_bias`."""
        # The projection of the keys may serve for the positions as well.
        self.active = False
        try:
            original = type(self.module).disentangled_attention_bias
            bias = original(self.module, query, key[:, self.prefix.length :], *args, **kwargs)
        finally:
            self.active = True
        return F.pad(bias, (self.prefix.length, 0)) if isinstance(bias, Tensor) else bias
