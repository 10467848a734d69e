"""A module's call: what its forward is given, by name, and the cache of keys and values among it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import nn

# What versions of transformers call the argument that holds the cache of keys and values.
CACHES = ("cache", "past_key_values", "layer_past")


def arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, as its class has it, in their order."""
    return _arguments(type(module).forward)


# A decoded token asks at every layer.
@cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of the module by name, those given by position included."""
    return {**dict(zip(arguments(module), args, strict=False)), **kwargs}


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache of keys and values among a call's arguments by name; None if it has none."""
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens of an earlier call."""
    if cache is None:
        return False
    return bool(cache.has_previous_state() if _is_recurrent(cache) else cache.get_seq_length() > 0)


def has_fixed_size(cache: Any) -> bool:
    """Whether a cache was made for a fixed number of tokens (`StaticCache`)."""
    return bool(getattr(cache, "is_compileable", False)) and not _is_recurrent(cache)


def _is_recurrent(cache: Any) -> bool:
    """Whether all layers keep a state of one size in place of keys and values (Mamba)."""
    linear = getattr(cache, "is_linear", ())
    return bool(linear) and all(linear)
