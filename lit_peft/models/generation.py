"""Arguments for transformers' `generate`, checked before a run rather than at its first prediction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from lit_peft.util.errors import LitPeftError, closest

# transformers uses these only when it samples.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 < value < math.inf, "a number above 0"),
    **dict.fromkeys(("top_p", "typical_p"), (lambda value: 0 < value <= 1, "a number above 0, at most 1")),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "top_k": (lambda value: value >= 0 and value == int(value), "a whole number of at least 0"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "a number above 0"),
    **dict.fromkeys(
        ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"),
        (lambda value: value >= 1 and value == int(value), "a whole number of at least 1"),
    ),
}


def check_generation(given: Mapping[str, Any], field: str = "generation") -> None:
    """Check arguments for `generate`.

    Args:
        given: the arguments; None for one that is not set.
        field: the setting that they belong to, for messages.

    Raises:
        LitPeftError: `generate` has no such argument, would ignore it, or would not accept its value.
    """
    if not given:
        return
    from transformers import GenerationConfig, GenerationMixin

    known = (vars(GenerationConfig()).keys() | inspect.signature(GenerationMixin.generate).parameters.keys()) - {"self"}
    for name, value in given.items():
        if name not in known:
            near = closest(name, sorted(known))
            raise LitPeftError(f"{field} has {name!r}, which is no argument of `generate`: the closest are {near}.")
        if value is None or name not in _RANGES:
            continue
        is_valid, values = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_valid(value):
            raise LitPeftError(f"{field} has {name}={value!r}: give {values}.")
    unused = [] if given.get("do_sample") else [name for name in _SAMPLING if given.get(name) is not None]
    if unused:
        raise LitPeftError(
            f"{field} has {unused[0]!r}, which has no effect without do_sample: true; add that, or leave it out."
        )
