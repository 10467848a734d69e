"""What is asked of transformers' `generate`, checked before a run rather than at its first prediction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from lit_peft.util.errors import LitPeftError, closest

# transformers reads these where it draws tokens alone.
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
    """Refuse arguments that `generate` does not have, would not read, or cannot take.

    Args:
        given: the arguments; None is a value that is not set.
        field: the setting they stand in, for messages.

    Raises:
        LitPeftError: names the first such argument.
    """
    if not given:
        return
    from transformers import GenerationConfig, GenerationMixin

    known = (vars(GenerationConfig()).keys() | inspect.signature(GenerationMixin.generate).parameters.keys()) - {"self"}
    for name, value in given.items():
        if name not in known:
            near = closest(name, sorted(known))
            raise LitPeftError(f"{field} has {name!r}, which `generate` does not take: the closest are {near}.")
        if value is None or name not in _RANGES:
            continue
        fits, wanted = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
            raise LitPeftError(f"{field} has {name}={value!r}: give {wanted}.")
    unread = [] if given.get("do_sample") else [name for name in _SAMPLING if given.get(name) is not None]
    if unread:
        raise LitPeftError(
            f"{field} has {unread[0]!r}, which has no effect without do_sample: true; add that, or drop it."
        )
