"""Cells of a table as class labels or numbers."""

from __future__ import annotations

import math
import re
from typing import Any

from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

Label = int | str


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


def parse_number(value: Any) -> float | None:
    """Return a cell as a finite number; None if it is not one."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
