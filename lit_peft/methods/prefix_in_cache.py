"""A prefix for attention that is computed in a model's own code and takes keys and values from a cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_peft.methods.layer_prefix import LayerPrefix
from lit_peft.models.call_arguments import CACHES, arguments, by_name, cache_of
from lit_peft.models.transformers_internals import alibi_function

Call = tuple[tuple[Any, ...], dict[str, Any]]


class PrefixInCache:
    """Forward pre-hook of an attention module that is called with a mask, a cache, and ALiBi's bias (BLOOM, Falcon).

    Args:
        prefix: the layer's prefix.
    """

    def __init__(self, prefix: LayerPrefix) -> None:
        self.prefix = prefix

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        values, length = by_name(module, args, kwargs), self.prefix.length
        mask, alibi = values.get("attention_mask"), values.get("alibi")
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

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length(*args)


class DistancePrefix:
    """Forward pre-hook of an attention whose bias depends on the distance to the last key (MPT).

    The prefix is as far from each query as the query is from itself, so its distance is the same in a padded row and
    with a cache.

    Args:
        prefix: the layer's prefix.
    """

    def __init__(self, prefix: LayerPrefix) -> None:
        self.prefix = prefix

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        values, length = by_name(module, args, kwargs), self.prefix.length
        cache, mask, bias = cache_of(values), values.get("attention_mask"), values.get("position_bias")
        num_queries = values["hidden_states"].shape[1]
        num_keys = num_queries + (0 if cache is None else cache.get_seq_length(module.layer_idx))
        if mask is not None:
            # True where a key is hidden.
            values["attention_mask"] = F.pad(mask, (length, 0), value=False)
        if bias is not None:
            bias = bias[..., -num_keys:]  # (heads, 1, keys)
            own = bias[..., -num_queries:].transpose(1, 2).expand(-1, -1, length)
            values["position_bias"] = torch.cat([own, bias.expand(-1, num_queries, -1)], dim=-1)
        name = next(name for name in CACHES if name in arguments(module))
        values[name] = _PrefixedCache(self.prefix, cache)
        return (), values
