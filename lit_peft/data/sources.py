"""A split's setting to the rows it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data.files import column_values, is_file, read_hub, require_columns, stream_file
from lit_peft.data.joined import join_rows
from lit_peft.data.notes import MEANINGFUL_COLUMNS, note_unused_columns
from lit_peft.data.rows import ROW_NUMBER, Rows, Split
from lit_peft.data.source_files import HUB_PREFIX, files_of, is_saved_dataset, load_saved, names_files, split_hub_name
from lit_peft.data.source_settings import Source, SourceSet, parse_setting
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
        if self.name is not None and is_saved_dataset(self.name):
            return load_saved(self.name)
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
        if value is not None and not self.has(value) and not names_files(value):
            raise LitPeftError(
                f"data.{split} {value!r} is neither a file nor a split of {self.name!r}; nearest: "
                f"{closest(value, self.splits)}."
            )
        return value

    def has(self, value: str) -> bool:
        """Tell whether what `find` returned is a split of the dataset rather than a file."""
        return self.name is not None and not is_file(value) and value in self.splits

    def table(self, value: str, split: Split, limit: int | None = None) -> Dataset:
        """Return a split of the dataset as a table; of a streamed dataset, the first `limit` rows of it.

        Raises:
            LitPeftError: the dataset is streamed, and there is no limit.
        """
        import datasets

        found = self.splits[value]
        if not self.streaming or isinstance(found, datasets.Dataset):
            table: Dataset = found
            return table
        if limit is None:
            raise LitPeftError(
                f"data.streaming is set, and data.limit_{split} is not, so the number of rows to read is unknown; set "
                f"data.limit_{split}."
            )
        return datasets.Dataset.from_list(list(found.take(limit)), features=found.features)


@dataclass(frozen=True)
class Piece:
    """A file, or a split of a dataset.

    Attributes:
        name: the file, or the dataset and its split, for error messages.
        columns: new name -> name in the file.
        hub: the dataset; None: `name` is a file.
        split: the dataset's split.
    """

    name: str
    columns: Mapping[str, str]
    hub: HubDataset | None = None
    split: str = ""

    def table(self, data: Any, split: Split) -> Dataset:
        """Return the rows as a table with the columns of `data.prepare_table`."""
        field = f"data.{split}"
        if self.hub is not None:
            table = self.hub.table(self.split, split, data.limits.get(split))
        else:
            table = data.read(self.name, field, split)
        if self.columns:
            require_columns(table, {f"columns of {field}": old for old in self.columns.values()}, field, self.name)
            # A renamed column takes the place of one that has its new name.
            moved = set(self.columns.values())
            table = table.remove_columns(
                [new for new in self.columns if new in table.column_names and new not in moved]
            )
            table = table.rename_columns({old: new for new, old in self.columns.items()})
        prepared: Dataset = data.prepare_table(table, split, field, self.name)
        return prepared

    def rows(self, data: Any) -> Iterator[dict[str, Any]]:
        """Read the training rows one by one."""
        if self.hub is not None:
            # `iter(rows)` would divide the files among the workers.
            blocks = self.hub.splits[self.split].iter(1_000)
            rows = ((block, row) for block in blocks for row in zip(*block.values(), strict=True))
            found: Iterator[dict[str, Any]] = (dict(zip(block, row, strict=True)) for block, row in rows)
        else:
            found = stream_file(self.name, "data.train", **text_options(data, "train"))
        if not self.columns:
            yield from found
            return
        new_names = {old: new for new, old in self.columns.items()}
        for number, row in enumerate(found, start=1):
            lacking = next((old for old in new_names if old not in row), None)
            if lacking is not None:
                raise LitPeftError(
                    f"data.train {self.name!r}, row {number} has no column {lacking!r}, which columns renames; it has "
                    f"{', '.join(map(repr, row))}."
                )
            kept = {name: cell for name, cell in row.items() if name not in self.columns or name in new_names}
            yield {new_names.get(name, name): cell for name, cell in kept.items()}


def source_sets(data: Any, split: Split) -> list[SourceSet]:
    """Return the sources that a split's setting names; of a hub dataset without a setting, its split of that name."""
    value = data.sources[split]
    if value is None or isinstance(value, str):
        value = data.hub.find(split, value)
    return parse_setting(value, split)


def pieces_of(data: Any, source: Source, split: Split) -> list[Piece]:
    """Return the files and dataset splits that a source consists of; a glob or folder is noted.

    Raises:
        LitPeftError: there are none.
    """
    if source.path.startswith(HUB_PREFIX):
        name, config, part = split_hub_name(source.path, f"data.{split}")
        hub = HubDataset(name, config, data.streaming)
        if part is not None and part not in hub.splits:
            raise LitPeftError(
                f"data.{split} {source.path!r} is not a split of {name!r}; nearest: {closest(part, hub.splits)}."
            )
        found = part or hub.find(split, None)
        if found is None:
            raise LitPeftError(
                f"data.{split} {source.path!r} has no split for {split}; add one of its splits: "
                f"{', '.join(f'{source.path}:{name}' for name in hub.splits)}."
            )
        return [Piece(f"{source.path.removesuffix(f':{found}')}:{found}", source.columns, hub, found)]
    if data.hub.has(source.path):
        return [Piece(f"{data.dataset}:{source.path}", source.columns, data.hub, source.path)]
    if is_saved_dataset(source.path):
        hub = HubDataset(source.path, None, data.streaming)
        found = hub.find(split, None) if len(hub.splits) > 1 else next(iter(hub.splits))
        if found is None:
            raise LitPeftError(f"data.{split} {source.path!r} has only the splits {', '.join(map(repr, hub.splits))}.")
        return [Piece(source.path if len(hub.splits) == 1 else f"{source.path}:{found}", source.columns, hub, found)]
    files, note = files_of(source.path, split)
    if note:
        data.notes.add(note, once=True)
    return [Piece(file, source.columns) for file in files]


def read_rows(data: Any, split: Split) -> Rows | None:
    """Read the rows that a split's setting names; None if it names nothing.

    Raises:
        LitPeftError: a source is missing or broken, lacks a column, or no row is left.
    """
    sets = source_sets(data, split)
    field = f"data.{split}"
    where = {} if split == "predict" else data.where
    parts: list[Rows] = []
    groups: list[tuple[str, float | None, int]] = []
    for named in sets:
        first = len(parts)
        for source in named.sources:
            start = len(parts)
            for piece in pieces_of(data, source, split):
                table = piece.table(data, split)
                columns = data.columns(split)  # InstructionData finds them in the table
                parts.append(select_rows(table, field, piece.name, columns, {}))
                used = (*columns.values(), *data.optional_columns, *where)
                note_unused_columns(data.notes, field, table.column_names, used)
            if source.weight is not None:
                groups.append((source.path, source.weight, len(parts) - start))
        if named.name:
            groups.append((named.name, None, len(parts) - first))
    if not parts:
        return None
    return keep_where(join_rows(parts, ", ".join(map(str, sets)), groups), where)


def select_rows(
    table: Dataset, field: str, source: str, columns: dict[str, str | None], where: Mapping[str, Any]
) -> Rows:
    """Check that a table has the columns a task reads, and keep the rows with certain values.

    Args:
        table: the table.
        field: the setting the table was read from ("data.train").
        source: that setting's value.
        columns: setting's name -> column it names.
        where: see `keep_where`.

    Raises:
        LitPeftError: a column is missing, or no row is left.
    """
    require_columns(table, columns, field, source)
    numbers = column_values(table, ROW_NUMBER) if ROW_NUMBER in table.column_names else None
    return keep_where(Rows(table, list(range(len(table))), field, source, numbers), where)


def keep_where(rows: Rows, where: Mapping[str, Any]) -> Rows:
    """Keep the rows with certain values.

    Args:
        rows: the rows.
        where: column -> the accepted value, or a list of values.

    Raises:
        LitPeftError: a column is missing, or no row is left.
    """
    indices = rows.indices
    for column, accepted in where.items():
        require_columns(rows.table, {"data.where": column}, rows.field, rows.source)
        indices = filter_rows(indices, column_values(rows.table, column), accepted, column, rows.field)
    return replace(rows, indices=indices)


def text_options(data: Any, split: Split) -> dict[str, Any]:
    """Return the arguments of `read_file` and `stream_file` that depend on the task."""
    text_column = next((column for column in data.columns(split).values() if column), "text")
    # Prompts to continue are one per line, whatever the training text looks like.
    unit = "line" if split == "predict" else data.text_unit
    sets = parse_setting(data.sources[split], split)
    renamed = [old for named in sets for source in named.sources for old in source.columns.values()]
    optional = dict.fromkeys((*data.optional_columns, *MEANINGFUL_COLUMNS, *renamed), False)
    used = {**optional, **dict.fromkeys((*filter(None, data.columns(split).values()), *data.where), True)}
    return {"text_column": text_column, "text_unit": unit, "tsv": data.tsv, "used": used}


def missing_split(data: Any, split: Split) -> str:
    """Return the error message for a split that no setting names."""
    or_fraction = f" or data.{split}_fraction" if split in data.fractions else ""
    return f"data.{split} is not given; set data.{split} to a file{or_fraction}."
