"""Cells of a table as class labels or numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from lit_peft.data.collate import IGNORE
from lit_peft.data.files import column_values
from lit_peft.data.notes import Notes, share_of
from lit_peft.data.rows import Rows
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

Label = int | str
# Numbers that hub datasets and training libraries write in place of a label.
HIDDEN_LABELS = {-1: "a hidden label, as in GLUE's test files", -100: "a label to ignore"}


def canonical_label(value: Any) -> Label | None:
    """Bring a label to one form: whole numbers become int, however they are written, and all else becomes text.

    Args:
        value: a cell.

    Returns:
        The label; None for an empty cell.

    Raises:
        LitPeftError: the cell is a number with a fraction, or a list.
    """
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        raise LitPeftError(f"{value} in data.label_column is not a class; labels are whole numbers or names.")
    if isinstance(value, str):
        text = value.strip()
        number = re.fullmatch(r"(0|-?[1-9]\d*)(\.0+)?", text)
        return int(number.group(1)) if number else text or None
    raise LitPeftError(f"{brief(value)} in data.label_column is not a class; labels are whole numbers or names.")


def check_hidden_labels(rows: Rows, labels: Sequence[Any], notes: Notes, known: Collection[Any] | None) -> None:
    """Refuse or note the numbers that stand for a label which is hidden or ignored: -1 in GLUE's test files, and -100.

    Args:
        rows: the rows of a split.
        labels: the label of each row of the table, in the form of `canonical_label`.
        notes: takes a line if -1 is counted as a class, because some of the rows have other labels.
        known: the classes, if they were given; None: every label that occurs in training is one.

    Raises:
        LitPeftError: all rows have such a label, or some have and it is no class.
    """
    for number, meaning in HIDDEN_LABELS.items():
        count = sum(labels[index] == number for index in rows.indices)
        if not count:
            continue
        share = share_of(count, len(rows), "rows")
        start = f"{rows.field} {rows.source!r}: {share} have the label {number}"
        if count == len(rows):
            raise LitPeftError(f"{start}, which stands for {meaning}: give a file with the labels.")
        if number == -1 and (known is None or number in known):
            notes.add(f"{start}, which is a class here. If it stands for {meaning}, remove these rows.", warn=True)
            continue
        raise LitPeftError(f"{start}, which stands for {meaning}: remove these rows, or give their labels.")


def label_counts(data: Any) -> tuple[list[int], int]:
    """Count the labels of a data module's training rows, after `setup`.

    Returns:
        For each label, the number of rows (of tagged texts: words) with it; and the number of rows (words).

    Raises:
        LitPeftError: the rows have no labels, or are not read before training.
    """
    names = getattr(data, "label_names", None)
    if names is None or data.streaming or "train" not in data.rows:
        raise LitPeftError(
            "Balanced weights need the labels of all training rows: give data.train without data.streaming, or give "
            "the weights as a list in task_args."
        )
    found = column_values(data.examples("train"), "labels")
    if getattr(data, "problem_type", None) == "multi_label":  # 0 or 1 for each label
        return [int(sum(values)) for values in zip(*found, strict=True)], len(found)
    flat = [label for labels in found for label in (labels if isinstance(labels, list) else [labels])]
    counted = Counter(label for label in flat if label != IGNORE)
    return [counted[index] for index in range(len(names))], counted.total()


def parse_number(value: Any) -> float | None:
    """Return a cell as a finite number; None if it is not one."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
