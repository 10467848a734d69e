"""Several labels, or several numbers to predict, in each row of a table."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_peft.data.files import column_values
from lit_peft.data.labels import HIDDEN_LABELS, Label, canonical_label, parse_number
from lit_peft.data.notes import Notes, share_of
from lit_peft.data.rows import Rows, Split
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

# A table's form is found from the first cell that is not empty; this many rows are searched for one.
_ROWS_TO_SEARCH = 100
# How files write yes and no in a column of a label.
_YES_OR_NO = {0: False, 1: True, "false": False, "true": True, "no": False, "yes": True}


@dataclass(frozen=True)
class LabelSets:
    """How the rows of a table write their labels.

    Attributes:
        columns: a column of 0 and 1 for each label; or a single column of lists.
        separator: what separates the labels in a cell of text.
        is_list: whether `columns` is a single column of lists.
    """

    columns: tuple[str, ...]
    separator: str | None = None
    is_list: bool = False

    def describe(self) -> str:
        """Return the form in words, for the banner."""
        if not self.is_list:
            return f"several labels per row, from the columns of 0 and 1 {', '.join(map(repr, self.columns))}"
        how = "lists" if self.separator is None else f"text separated by {self.separator!r}"
        return f"several labels per row, from the {how} in column {self.columns[0]!r}"

    def read(self, rows: Rows) -> dict[int, list[Label]]:
        """Return the labels of each selected row, by its index.

        Raises:
            LitPeftError: names the first row whose labels cannot be read.
        """
        values = [column_values(rows.table, column) for column in self.columns]
        declared = self.declared(rows.table)
        found: dict[int, list[Label]] = {}
        for index in rows.indices:
            try:
                if self.is_list:
                    found[index] = list(dict.fromkeys(self._of_cell(values[0][index], declared)))
                else:
                    cells = zip(self.columns, (column[index] for column in values), strict=True)
                    found[index] = [column for column, cell in cells if _is_yes(column, cell)]
            except ValueError as problem:
                raise LitPeftError(f"{rows.locate(index)}: {problem}") from problem
        return found

    def declared(self, table: Dataset) -> list[str] | None:
        """Return the names of all labels if the table declares them."""
        feature = table.features[self.columns[0]] if self.is_list else None
        names: list[str] | None = getattr(getattr(feature, "feature", None), "names", None)
        return names

    def _of_cell(self, cell: Any, declared: Sequence[str] | None) -> list[Label]:
        column = self.columns[0]
        if self.separator is not None and (cell is None or isinstance(cell, str)):
            cell = [part for part in (cell or "").split(self.separator) if part.strip()]
        cell = _parsed(cell) if isinstance(cell, str) else cell
        if not isinstance(cell, list):
            raise ValueError(f"column {column!r} has {brief(cell)}, which is not a list; give [] for no label.")
        labels: list[Label] = []
        for value in cell:
            if declared is not None and isinstance(value, int) and 0 <= value < len(declared):
                labels.append(declared[value])
                continue
            try:
                label = canonical_label(value)
            except LitPeftError as problem:
                raise ValueError(str(problem)) from problem
            if label is None or label in HIDDEN_LABELS:
                raise ValueError(f"column {column!r} has the label {brief(value)}, which is none; remove it.")
            labels.append(label)
        return labels


def find_label_sets(
    table: Dataset, column: str, label_columns: Sequence[str] | None, separator: str | None
) -> LabelSets | None:
    """Return how the rows of a table write several labels; None if each has one.

    Args:
        table: the table.
        column: the column of the label, or of the labels.
        label_columns: a column of 0 and 1 for each label, if a setting names them.
        separator: what separates labels in text, if a setting says so.
    """
    if label_columns is not None:
        return LabelSets(tuple(label_columns))
    if separator is not None:
        return LabelSets((column,), separator, True)
    if column not in table.column_names:
        return None
    cells = (table[index][column] for index in range(min(len(table), _ROWS_TO_SEARCH)))
    first = next((cell for cell in cells if cell not in (None, "")), None)
    is_list = isinstance(first, list) or (isinstance(first, str) and isinstance(_parsed(first), list))
    return LabelSets((column,), None, True) if is_list else None


def to_vectors(rows: Rows, found: Mapping[int, Sequence[Label]], ids: Mapping[Label, int]) -> list[list[float]]:
    """Return 0 or 1 for each label of each row.

    Args:
        rows: the rows.
        found: what `LabelSets.read` returned for them.
        ids: the number of each label.

    Raises:
        LitPeftError: names the first row with another label.
    """
    out = []
    for index in rows.indices:
        unknown = next((label for label in found[index] if label not in ids), None)
        if unknown is not None:
            known = closest(str(unknown), [str(label) for label in ids])
            raise LitPeftError(
                f"{rows.locate(index)}: label {unknown!r} does not occur in training; the closest are {known}. Correct "
                "it, or list all in data.labels."
            )
        present = {ids[label] for label in found[index]}
        out.append([float(number in present) for number in range(len(ids))])
    return out


def read_targets(rows: Rows, columns: Sequence[str]) -> list[list[float]]:
    """Return the numbers to predict of each row.

    Raises:
        LitPeftError: names the first cell that is not a number.
    """
    values = {column: column_values(rows.table, column) for column in columns}
    out = []
    for index in rows.indices:
        row = []
        for column, cells in values.items():
            number = parse_number(cells[index])
            if number is None:
                raise LitPeftError(
                    f"{rows.locate(index)} has {brief(cells[index])} in column {column!r}, which is not a number; "
                    "correct it."
                )
            row.append(number)
        out.append(row)
    return out


def check_columns(columns: Sequence[str], regression: bool) -> None:
    """Check the setting that names the columns of several labels or targets.

    Raises:
        LitPeftError: it names one column only, or one twice.
    """
    if len(set(columns)) < max(len(columns), 2):
        instead = "data.label_column for one"
        what = "numbers to predict" if regression else "labels"
        raise LitPeftError(
            f"data.label_columns is {brief(list(columns))}; give at least two different columns of {what}, or "
            f"{instead}."
        )


def note_label_sets(
    notes: Notes, split: Split, vectors: Sequence[Sequence[float]], names: Sequence[Label] | None
) -> None:
    """Note how many labels the rows of a split have.

    Args:
        notes: takes the note.
        split: the split.
        vectors: 0 or 1 for each label of each row.
        names: the labels; None: the vectors are numbers to predict.
    """
    if names is None or not vectors:
        return
    counts = [int(sum(row)) for row in vectors]
    without = share_of(counts.count(0), len(counts), "rows")
    notes.add(f"data.{split}: {sum(counts) / len(counts):.2f} of {len(names)} labels per row; {without} have none.")


def _parsed(text: str) -> Any:
    """Return a cell that is a list written as JSON or in Python's form; any other text as it is."""
    if not (text.strip().startswith("[") and text.strip().endswith("]")):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _is_yes(column: str, cell: Any) -> bool:
    """Tell whether a row has the label of a column.

    Raises:
        ValueError: the cell is neither 0 nor 1.
    """
    try:
        value = canonical_label(cell)
    except LitPeftError:
        value = None
    value = value.lower() if isinstance(value, str) else value
    if value not in _YES_OR_NO:
        raise ValueError(f"column {column!r} has {brief(cell)}; give 1 for rows with this label and 0 for the others.")
    return _YES_OR_NO[value]
