"""The arguments of a module's call by name, and the cache of keys and values among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import nn

# Names of the cache argument in different versions of transformers.
CACHES = ("cache", "past_key_values", "layer_past")


def arguments(module: nn.Module) -> tuple[str, ...]:
    """Return the argument names of a module's forward (that of its class), in order."""
    return _arguments(type(module).forward)


# Cached, because every layer asks again for each decoded token.
@cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of the module by name, including positional ones."""
    return {**dict(zip(arguments(module), args, strict=False)), **kwargs}


def cache_of(values: Mapping[str, Any]) -> Any:
    """Return the cache of keys and values among a call's arguments; None if there is none."""
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def is_filled(cache: Any) -> bool:
    """Return whether a cache contains tokens of an earlier call."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):  # that of xLSTM
        return bool(cache.seqlen_offset > 0)
    return bool(cache.has_previous_state() if _is_recurrent(cache) else cache.get_seq_length() > 0)


def has_fixed_size(cache: Any) -> bool:
    """Return whether a cache was created for a fixed number of tokens (`StaticCache`)."""
    return bool(getattr(cache, "is_compileable", False)) and not _is_recurrent(cache)


def _is_recurrent(cache: Any) -> bool:
    """Return whether all layers keep a state of fixed size instead of keys and values (Mamba)."""
    linear = getattr(cache, "is_linear", ())
    return bool(linear) and all(linear)
