"""Checks of the settings that all data modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_peft.data.source_settings import parse_setting
from lit_peft.util.errors import LitPeftError, closest


def check_settings(data: Any) -> None:
    """Check a data module's common settings.

    Raises:
        LitPeftError: a value is out of range, or two settings exclude each other.
    """
    minimum: dict[str, tuple[int | None, int]] = {
        "batch_size": (data.batch_size, 1),
        "max_length": (data.known_length, 2),
        "num_workers": (data.num_workers, 0),
        "num_proc": (data.num_proc, 1),
        "shuffle_buffer": (data.shuffle_buffer, 1),
        "pad_to_multiple_of": (data.pad_to_multiple_of, 1),
        **{f"limit_{split}": (limit, 1) for split, limit in data.limits.items()},
    }
    for name, (value, least) in minimum.items():
        if value is not None and value < least:
            raise LitPeftError(f"data.{name} is {value}; it must be at least {least}.")
    for split, value in data.sources.items():
        parse_setting(value, split)
    names = [found.name for found in parse_setting(data.sources["validation"], "validation") if found.name]
    if data.validation_monitor is not None and data.validation_monitor not in (*names, "mean"):
        raise LitPeftError(
            f"data.validation_monitor is {data.validation_monitor!r}, which is neither 'mean' nor a set of "
            f"data.validation; the closest are {closest(data.validation_monitor, names) or 'none: it names no sets'}."
        )
    refuse_unused(
        "without several sets in data.validation", {"validation_monitor": data.validation_monitor and not names}
    )
    if data.truncation_side not in data.truncation_sides:
        raise LitPeftError(
            f"data.truncation_side is {data.truncation_side!r}; {type(data).__name__} allows "
            f"{' or '.join(map(repr, data.truncation_sides))}."
        )
    for split, fraction in data.fractions.items():
        if not 0 <= fraction < 1:
            raise LitPeftError(f"data.{split}_fraction is {fraction}; it must be at least 0 and less than 1.")
    if (total := sum(data.fractions.values())) >= 1:
        raise LitPeftError(
            f"data.validation_fraction + data.test_fraction is {total}; it must be less than 1, or no row is left to "
            "train on."
        )
    if data.streaming:
        needs_all_rows = {
            "group_by_length": data.group_by_length,
            "num_proc": data.num_proc,
            "limit_train": data.limits["train"],
            "test_fraction": data.fractions["test"],
            "where": data.where,
        }
        conflict = next((name for name, value in needs_all_rows.items() if value), None)
        if conflict:
            raise LitPeftError(
                f"data.streaming and data.{conflict} are both set, but {conflict} needs all rows before training "
                f"starts; leave out {conflict} or streaming."
            )
    refuse_unused("without data.dataset", {"dataset_config": data.dataset_config and not data.dataset})
    refuse_unused("with data.tokenizer", {"revision": data.revision and data.tokenizer_name})
    if data.padding_side not in (None, "left", "right"):
        raise LitPeftError(f"data.padding_side is {data.padding_side!r}; use 'left' or 'right'.")


def refuse_unused(condition: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that would have no effect.

    Args:
        condition: when they have no effect, such as "without data.dataset".
        given: the settings by name; a true value means that the setting was given.

    Raises:
        LitPeftError: names the first setting that was given.
    """
    name = next((name for name, value in given.items() if value), None)
    if name is not None:
        raise LitPeftError(f"data.{name} is set but has no effect {condition}; leave it out.")
