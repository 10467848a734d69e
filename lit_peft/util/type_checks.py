"""Whether values are of the kinds that annotations say: settings come from files and command lines, too."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Collection, Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_peft.util.errors import LitPeftError


def check_types(owner: Any, values: Mapping[str, Any], where: str = "") -> None:
    """Check values against the annotations of a class or function.

    Any collection stands for a sequence, any path for a text, a whole number for a float. Which of the words of a
    `Literal` there are is left to its owner, who can say more about it.

    Args:
        owner: what has the annotations.
        values: values by the annotated names; other names are passed over.
        where: what to begin the message with, e.g. `"adapter_config.json: "`.

    Raises:
        LitPeftError: names the first value of another kind.
    """
    hints = _hints(owner)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise LitPeftError(f"{where}{name}={brief(value)} is not of its kind: give {_said(hints[name])}.")


def brief(value: Any, most: int = 80) -> str:
    """A value as it stands in a message, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


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


def _said(hint: Any) -> str:
    """A kind in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_said(part) for part in parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is dict:
        return f"a mapping to {_said(parts[1])}"
    if origin is not None:
        return f"a list of {_said(parts[0])}"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
