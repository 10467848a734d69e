"""Rows of a table, and what all tasks do with their text columns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_peft.data.files import column_values
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

# A table's form is found from the first value of each column; this many rows are searched for one.
_ROWS_TO_SEARCH = 100

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "validation", "test", "predict"]


# A column that `prepare_table` may add if it makes several rows of one or none: the row's number in the source, from 1.
ROW_NUMBER = "row_number_in_source"
# Characters of a text that is tokenized as a whole: beyond, it takes minutes, and gigabytes of memory.
LONGEST_TEXT = 5_000_000


class RowError(Exception):
    """A row of a batch is wrong; `tokenize` turns it into a `LitPeftError` that names the file and the row.

    Args:
        index: the row's position in the batch.
        problem: what is wrong with it, and what to do.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index, self.problem = index, problem


@dataclass(frozen=True)
class Rows:
    """A selection of a table's rows.

    Attributes:
        table: the whole table.
        indices: the selected rows, as 0-based positions in the table.
        field: the setting the table was read from ("data.train"), for error messages.
        source: that setting's value.
        row_numbers: the table's row numbers in the source, from 1, if they are not 1, 2, 3, ….
    """

    table: Dataset
    indices: list[int]
    field: str
    source: str
    row_numbers: list[int] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def to_table(self) -> Dataset:
        """Return the selected rows as a table of their own."""
        if len(self.indices) == len(self.table):
            return self.table
        return self.table.select(self.indices)

    def locate(self, index: int) -> str:
        """Return the setting, its value and the row number of a table row, to start an error message with."""
        number = self.row_numbers[index] if self.row_numbers else index + 1
        return f"{self.field} {self.source!r}, row {number}"


def normalize_text(text: str) -> str:
    """Collapse white space and strip both ends; two texts count as equal if this form is equal."""
    return " ".join(text.split())


def text_key(table: Dataset, columns: Iterable[str | None]) -> Callable[[int], Hashable]:
    """Return a function that maps a row index to the normalized texts of these columns (None is skipped)."""
    values = [column_values(table, column) for column in columns if column]
    return lambda index: tuple(normalize_text(str(column[index])) for column in values)


def require_text(
    rows: Rows, columns: Iterable[str | None], may_be_empty: bool = False, longest: int | None = LONGEST_TEXT
) -> None:
    """Check that every row has text in each of these columns (None is skipped).

    Raises:
        LitPeftError: a cell is empty (unless `may_be_empty`), is not text, or has more than `longest` characters; the
            message names the row.
    """
    for column in filter(None, columns):
        texts = column_values(rows.table, column)
        for index in rows.indices:
            if not may_be_empty and (texts[index] is None or not str(texts[index]).strip()):
                raise LitPeftError(f"{rows.locate(index)} has no text in column {column!r}; remove the row.")
            if isinstance(texts[index], (dict, list, bytes)):
                raise LitPeftError(
                    f"{rows.locate(index)}: column {column!r} has {brief(texts[index])}, which is not text; correct it."
                )
            if longest is not None and len(str(texts[index] or "")) > longest:
                raise LitPeftError(
                    f"{rows.locate(index)}: column {column!r} has a text of {len(str(texts[index])):,} characters, and "
                    f"at most {longest:,} are read as one example: is a quote or a line break missing? Remove or split "
                    "the row."
                )


def first_values(table: Dataset) -> dict[str, Any]:
    """Return the first value of each column of a table, None if its first rows have none."""
    values = {}
    for name in table.column_names:
        first = (table[index][name] for index in range(min(len(table), _ROWS_TO_SEARCH)))
        values[name] = next((value for value in first if value is not None), None)
    return values
