"""A split's setting to the rows it names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data.files import column_values, is_file, read_hub, require_columns
from lit_peft.data.notes import MEANINGFUL_COLUMNS
from lit_peft.data.rows import Rows, Split
from lit_peft.data.splits import filter_rows
from lit_peft.util.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset


# Names under which hub datasets keep their validation split.
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "validation_matched")


class HubDataset:
    """The splits of a hub dataset, read on first use.

    Args:
        name: the dataset's hub id, or a local dataset folder; None: there is no dataset, and every source is a file.
        config: its configuration, such as "sst2" of "glue".
        streaming: open the splits without reading them.
    """

    def __init__(self, name: str | None, config: str | None = None, streaming: bool = False) -> None:
        self.name, self.config, self.streaming = name, config, streaming

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The dataset's splits by name; empty without a dataset."""
        return {} if self.name is None else read_hub(self.name, self.config, streaming=self.streaming)

    def find(self, split: Split, value: str | None) -> str | None:
        """Return the file or hub split to read for a split; None if there is none.

        Args:
            split: the split.
            value: what the setting `data.<split>` says.

        Raises:
            LitPeftError: the setting names neither a file nor a split of the dataset.
        """
        if self.name is None:
            return value
        if value is None and split != "predict":
            names = _VALIDATION_NAMES if split == "validation" else (split,)
            value = next((name for name in names if name in self.splits), None)
            if value is None and split == "train":
                raise LitPeftError(
                    f"data.dataset {self.name!r} has no split 'train'; set data.train to one of its splits: "
                    f"{', '.join(map(repr, self.splits))}."
                )
        if value is not None and not is_file(value) and value not in self.splits:
            raise LitPeftError(
                f"data.{split} {value!r} is neither a file nor a split of {self.name!r}; nearest: "
                f"{closest(value, self.splits)}."
            )
        return value

    def has(self, value: str) -> bool:
        """Tell whether what `find` returned is a split of the dataset rather than a file."""
        return self.name is not None and not is_file(value)

    def table(self, value: str, split: Split, limit: int | None = None) -> Dataset:
        """Return a split of the dataset as a table; of a streamed dataset, the first `limit` rows of it.

        Raises:
            LitPeftError: the dataset is streamed, and there is no limit.
        """
        import datasets

        found = self.splits[value]
        if not self.streaming:
            table: Dataset = found
            return table
        if limit is None:
            raise LitPeftError(
                f"data.streaming is set, and data.limit_{split} is not, so the number of rows to read is unknown; set "
                f"data.limit_{split}."
            )
        return datasets.Dataset.from_list(list(found.take(limit)), features=found.features)


def select_rows(
    table: Dataset, field: str, source: str, columns: dict[str, str | None], where: Mapping[str, Any]
) -> Rows:
    """Check that a table has the columns a task reads, and keep the rows with certain values.

    Args:
        table: the table.
        field: the setting the table was read from ("data.train").
        source: that setting's value.
        columns: setting's name -> column it names.
        where: column -> the accepted value, or a list of values.

    Raises:
        LitPeftError: a column is missing, or no row is left.
    """
    require_columns(table, columns, field, source)
    indices = list(range(len(table)))
    for column, accepted in where.items():
        require_columns(table, {"data.where": column}, field, source)
        indices = filter_rows(indices, column_values(table, column), accepted, column, field)
    return Rows(table, indices, field, source)


def text_options(data: Any, split: Split) -> dict[str, Any]:
    """Return the arguments of `read_file` and `stream_file` that depend on the task."""
    text_column = next((column for column in data.columns(split).values() if column), "text")
    # Prompts to continue are one per line, whatever the training text looks like.
    unit = "line" if split == "predict" else data.text_unit
    optional = dict.fromkeys((*data.optional_columns, *MEANINGFUL_COLUMNS), False)
    used = {**optional, **dict.fromkeys((*filter(None, data.columns(split).values()), *data.where), True)}
    return {"text_column": text_column, "text_unit": unit, "tsv": data.tsv, "used": used}


def missing_split(data: Any, split: Split) -> str:
    """Return the error message for a split that no setting names."""
    or_fraction = f" or data.{split}_fraction" if split in data.fractions else ""
    return f"data.{split} is not given; set data.{split} to a file{or_fraction}."
