"""Checks of values against type annotations: settings also come from files and command lines."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Collection, Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_peft.util.errors import LitPeftError, printable

# How deep into a value messages look.
_DEPTH = 20


def check_types(owner: Any, values: Mapping[str, Any], where: str = "") -> None:
    """Check values against the annotations of a class or function.

    Any collection is accepted as a sequence, any path as a string and any integer as a float. Of a `Literal`, only the
    type is checked, because its owner can give a better message for an unknown word.

    Args:
        owner: the class or function with the annotations.
        values: values by annotated names; other names are ignored.
        where: the beginning of the message, e.g. `"adapter_config.json: "`.

    Raises:
        LitPeftError: names the first value of a wrong type.
    """
    hints = _hints(owner)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise LitPeftError(f"{where}{name}={brief(value)} has the wrong type: give {_in_words(hints[name])}.")


def brief(value: Any, most: int = 80) -> str:
    """Return a value as a string for a message, cut after `most` characters.

    Only that much of it is looked at: a value from a file can have millions of parts, or repeat one part as often.
    """
    text = _start(value, most + 1)
    return printable(text if len(text) <= most else f"{text[:most]}…")


def _start(value: Any, most: int, depth: int = 0) -> str:
    """Return the beginning of `repr(value)`, of `most` characters or more."""
    kind = type(value)
    if kind is str or kind is bytes:
        return repr(value[:most])
    if kind is int and value.bit_length() > 4 * most:
        return f"an integer of {value.bit_length():,} bits"
    if not isinstance(value, (dict, list, tuple, set, frozenset)) or not value:
        # Tensors would print their values.
        return repr(value) if not hasattr(value, "shape") else f"{kind.__name__} of shape {brief(tuple(value.shape))}"
    if depth == _DEPTH:
        return "…"
    parts: list[str] = []
    length = 2
    for part in value.items() if isinstance(value, dict) else value:
        if length > most:
            break
        pair = part if isinstance(value, dict) else (part,)
        parts.append(": ".join(_start(item, most, depth + 1) for item in pair))
        length += len(parts[-1]) + 2
    is_tuple = isinstance(value, tuple)
    inside = ", ".join(parts) + ("," if is_tuple and len(value) == 1 else "")
    opening, closing = "()" if is_tuple else "[]" if isinstance(value, list) else "{}"
    return f"{kind.__name__}({{{inside}}})" if kind is frozenset else f"{opening}{inside}{closing}"


@cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, tuple({type(part) for part in parts}))
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if origin is not None:
        collection = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return collection and all(_fits(part, parts[0]) for part in value)
    if hint is float or hint is int:
        number = isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
        return number and abs(value) < 2**63 and math.isfinite(value)
    if hint is str:
        return isinstance(value, (str, os.PathLike))
    return hint is Any or isinstance(value, hint)


def _in_words(hint: Any) -> str:
    """Return a type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(part) for part in parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is dict:
        return f"a mapping to {_in_words(parts[1])}"
    if origin is not None:
        return f"a list of {_in_words(parts[0])}"
    words = {float: "a number", int: "an integer", bool: "true or false", str: "a string", types.NoneType: "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
