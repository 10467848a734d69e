"""Files and hub datasets to tables (`datasets.Dataset`)."""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_peft.data.datasets_internals import set_fingerprint
from lit_peft.data.file_errors import file_error
from lit_peft.data.json_rows import JSON_VERSION, json_rows, json_table
from lit_peft.data.remote import inner_name, is_url, local_copy
from lit_peft.models.sources import PACKAGE_PREFIX, cache_root, hub_error, resolve_packaged_file
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

# Suffix of the file -> loader of `datasets`.
LOADERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
# Part of the name of every cached table: raise it when a function that makes such a table changes its result.
_TABLES_VERSION = 6
# Of files with more columns than this only the used ones are read, in blocks of this many cells.
_WIDE, _CELLS = 1_000, 1_000_000
# Characters of a cell; an unclosed quote makes one cell of the rest of the file.
_LONGEST_CELL = 2**28
# Columns that a message names.
_LISTED = 20
# Archives, which hold several files.
_COMPRESSED_SUFFIXES = (".zip",)
# How files that are not data files begin -> what they are, and what to do.
_FOREIGN_FILES = {
    **dict.fromkeys(
        (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"), "is compressed; unpack it"
    ),
    b"version https://git-lfs": "is only a Git LFS pointer; fetch the file itself (`git lfs pull`)",
    **dict.fromkeys((b"<!DOCTYPE html", b"<!doctype html", b"<html"), "is a web page; download the file itself"),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "is UTF-16, not UTF-8; save it as UTF-8"),
}


def is_file(value: str) -> bool:
    """Tell whether a setting names a file (by its prefix, suffix or existence) rather than a hub split."""
    known = value.startswith(PACKAGE_PREFIX) or is_url(value) or Path(inner_name(value)).suffix.lower() in LOADERS
    return known or Path(value).is_file()


def resolve_file(value: str, field: str, suffixes: Collection[str]) -> Path:
    """Return the path of the file that a setting names.

    Args:
        value: a path, or `"pkg:DISTRIBUTION/path"` for a file in an installed package.
        field: the setting's name, for error messages ("data.train").
        suffixes: the suffixes of files that can be read.

    Raises:
        LitPeftError: the file is missing, empty, compressed, or has another suffix.
    """
    named = resolve_packaged_file(value, field) if value.startswith(PACKAGE_PREFIX) else value
    path = local_copy(named, value, field)
    suffix = path.suffix.lower()
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise LitPeftError(f"{field} {value!r} {state}; give a file ({', '.join(suffixes)}).")
    if suffix not in (*suffixes, *_COMPRESSED_SUFFIXES):
        raise LitPeftError(f"{field} {value!r} has the unknown suffix {suffix!r}; use one of {', '.join(suffixes)}.")
    if path.stat().st_size == 0:
        raise LitPeftError(f"{field} {value!r} is empty (0 bytes); give a file with at least one row.")
    with path.open("rb") as stream:
        start = stream.read(32)
    foreign = next((problem for opening, problem in _FOREIGN_FILES.items() if start.startswith(opening)), None)
    if foreign or suffix in _COMPRESSED_SUFFIXES:
        raise LitPeftError(f"{field} {value!r} {foreign or 'has the suffix of a compressed file; unpack it'}.")
    return path


def read_file(
    value: str,
    field: str,
    text_column: str = "text",
    text_unit: str = "line",
    tsv: tuple[str, ...] | None = None,
    used: Mapping[str, bool] | None = None,
) -> Dataset:
    """Read a csv, tsv, json, jsonl, parquet or txt file.

    The cells of a csv file are separated by commas or, if its header has none, by semicolons or tabs. Every column of
    a csv or tsv file is read as text, because such a file has no types: "NA" and "007" stay as they are, and a column
    does not change its type halfway. The table is cached under a hash of the file's content.

    Args:
        value: a path, or `"pkg:DISTRIBUTION/path"` for a file in an installed package.
        field: the setting's name, for error messages ("data.train").
        text_column: name of the only column of a txt file.
        text_unit: one row of a txt file: "line", "paragraph" (split at blank lines) or "document".
        tsv: set it for tsv files in which quotes are part of the text: the column names of files without a header
            line, or ().
        used: the columns that are read if the file has them -> whether they are required. Of a csv or tsv file with
            more than 1,000 columns, the table has only these, and those with a name near that of a required one which
            is missing. None: all.

    Returns:
        The table, with at least one row.

    Raises:
        LitPeftError: the file is missing, empty, not UTF-8 or broken (with its line), or has an unknown suffix.
    """
    path, loader, options = _loading_options(value, field, text_unit, tsv, used)
    table: Dataset = _rename_text(_load(path, field, value, loader, options), loader, text_column)
    return table


def stream_file(
    value: str,
    field: str,
    text_column: str = "text",
    text_unit: str = "line",
    tsv: tuple[str, ...] | None = None,
    used: Mapping[str, bool] | None = None,
) -> Iterator[dict[str, Any]]:
    """Read a file row by row; see `read_file` for the arguments.

    Yields:
        The rows as dictionaries.

    Raises:
        LitPeftError: as `read_file`, when the broken row is reached.
    """
    path, loader, options = _loading_options(value, field, text_unit, tsv, used)
    if loader == "json":
        try:
            yield from (row for row, _ in json_rows(path, f"{field} {value!r}"))
        except Exception as exc:
            raise file_error(path, field, value, loader, exc) from exc
        return
    blocks, found = None, False
    while True:
        # Block by block, because readers of several files take turns, and the context must not stay open in between.
        with _readable_errors(path, field, value, loader):
            # `iter(dataset)` would divide the rows among the workers.
            blocks = blocks or iter(_open_stream(path, loader, options).iter(1_000))
            block = next(blocks, None)
        if block is None:
            break
        found = True
        names = [text_column if loader == "text" and name == "text" else name for name in block]
        yield from (dict(zip(names, row, strict=True)) for row in zip(*block.values(), strict=True))
    if not found:
        raise LitPeftError(f"{field} {value!r} has no rows; give a file with at least one row.")


def _rename_text(rows: Any, loader: str, text_column: str) -> Any:
    return rows.rename_column("text", text_column) if loader == "text" and text_column != "text" else rows


def _open_stream(path: Path, loader: str, options: dict[str, Any]) -> Any:
    import datasets

    return datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True, **options)


@contextlib.contextmanager
def _readable_errors(path: Path, field: str, value: str, loader: str) -> Iterator[None]:
    """Replace the errors of pandas, pyarrow and datasets by `file_error`."""
    try:
        with _silent_datasets():
            yield
    except Exception as exc:  # some are plain ValueErrors
        raise file_error(path, field, value, loader, exc) from exc


@contextlib.contextmanager
def _silent_datasets() -> Iterator[None]:
    """Hide the log lines of `datasets` about a failure that our own error reports."""
    from datasets.utils import logging as datasets_logging

    level = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(level)


def _loading_options(
    value: str, field: str, text_unit: str, tsv: tuple[str, ...] | None, used: Mapping[str, bool] | None
) -> tuple[Path, str, dict[str, Any]]:
    """Return the path, the loader of `datasets` and the loader's options."""
    path = resolve_file(value, field, LOADERS)
    loader = LOADERS[path.suffix.lower()]
    if loader == "csv":
        return path, loader, _csv_options(path, field, value, tsv, used)
    return path, loader, {"sample_by": text_unit} if loader == "text" else {}


def read_hub(name: str, config: str | None, field: str = "data.dataset", streaming: bool = False) -> dict[str, Any]:
    """Read all splits of a hub dataset, or of a local dataset folder.

    Args:
        name: the dataset's hub id, or a folder that `datasets.load_dataset` understands.
        config: its configuration, such as "sst2" of "glue".
        field: the setting's name, for error messages.
        streaming: open the splits without reading them.

    Returns:
        The splits by name: `datasets.Dataset`s, or `IterableDataset`s for streaming.

    Raises:
        LitPeftError: the dataset cannot be read; the message says why.
    """
    import datasets

    try:
        with _silent_datasets():
            found = datasets.load_dataset(name, config, streaming=streaming)
    except Exception as exc:  # datasets raises a dozen types, from ConnectionError to its own
        raise hub_error(name, exc, field=field, dataset=True) from exc
    return {str(split): table for split, table in found.items()}


def require_columns(table: Dataset, columns: dict[str, str | None], field: str, source: str) -> None:
    """Check that a table has the columns that settings name.

    Args:
        table: the table.
        columns: setting's name -> column it names; None is skipped.
        field: the setting the table was read from ("data.train").
        source: that setting's value.

    Raises:
        LitPeftError: a column is missing; the message lists those that exist.
    """
    for setting, column in columns.items():
        if column is not None and column not in table.column_names:
            raise LitPeftError(
                f"{field} {source!r} has no column {column!r} ({setting}); it has "
                f"{_listed(table.column_names)}; nearest: {closest(column, table.column_names, n=1)}."
            )


def _listed(names: Sequence[str]) -> str:
    """Return the names of columns for a message: all, or the first twenty and the number of the others."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def column_values(table: Dataset, column: str) -> list[Any]:
    """Return a column as plain Python values, in row order.

    Raises:
        LitPeftError: a text is not UTF-8, which a damaged parquet file may contain.
    """
    try:
        return list(table[column])
    except UnicodeDecodeError as exc:
        raise LitPeftError(f"column {column!r} has text that is not UTF-8 ({exc}); write the file again.") from None


def fingerprint(*parts: Any) -> str:
    """Return the name under which `datasets` caches a table that is made from these parts."""
    return hashlib.sha256(repr([_TABLES_VERSION, *parts]).encode()).hexdigest()[:32]


def tables_root() -> Path:
    """Return the folder of cached tables: one per major version of `datasets`, which cannot read a newer one's."""
    import datasets

    return cache_root() / "datasets" / datasets.__version__.partition(".")[0]


def _load(path: Path, field: str, value: str, loader: str, options: dict[str, Any]) -> Dataset:
    import datasets

    content = content_digest(path)
    # `datasets` would find a cached table by the file's path and time, which a changed file may keep.
    cache = tables_root() / content
    with _readable_errors(path, field, value, loader):
        if loader == "json":
            table = json_table(path, f"{field} {value!r}", cache / f"rows-{JSON_VERSION}.arrow")
        else:
            files = {"train": str(path.resolve())}
            table = datasets.load_dataset(loader, data_files=files, split="train", cache_dir=str(cache), **options)
    if len(table) == 0:
        raise LitPeftError(f"{field} {value!r} has no rows; give a file with at least one row.")
    settings = sorted((name, str(option)) for name, option in options.items())
    set_fingerprint(table, fingerprint(content, loader, settings))
    return table


def content_digest(path: Path) -> str:
    """Return a hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Let Python's csv reader take cells of more than 128 kB, as pandas does."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_options(
    path: Path, field: str, value: str, tsv: tuple[str, ...] | None, used: Mapping[str, bool] | None
) -> dict[str, Any]:
    from datasets import Features, Value

    is_tsv = path.suffix.lower() == ".tsv"
    separator = "\t" if is_tsv else ","
    quoting: Literal[0, 3] = csv.QUOTE_NONE if is_tsv and tsv is not None else csv.QUOTE_MINIMAL
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream, _long_cells():
            header = next(csv.reader(stream, delimiter=separator, quoting=quoting), [])
            if len(header) == 1:
                # Spreadsheets write semicolons where the decimal separator is a comma.
                separator = next((other for other in ";\t" if other in header[0]), separator)
            stream.seek(0)
            rows = csv.reader(stream, delimiter=separator, quoting=quoting)
            header = next(rows, [])
            first = next(rows, [])
    except (UnicodeDecodeError, csv.Error) as exc:
        raise file_error(path, field, value, "csv", exc) from exc
    has_header = not (is_tsv and tsv and len(header) == len(tsv) and not set(header) & set(tsv))
    header = header if has_header else list(tsv or ())
    if len(set(header)) < len(header) or not all(header):
        repeated = sorted(name for name, count in Counter(header).items() if count > 1 or not name)
        raise LitPeftError(
            f"{field} {value!r}: the header line has empty or repeated column names ({brief(repeated)}); rename them."
        )
    if len(first) > len(header):
        # pandas would silently use the surplus columns as an index and shift all others.
        raise LitPeftError(
            f"{field} {value!r}: the first row has {len(first)} cells under a header of {len(header)} "
            f"({_listed(header)}); quote cells that contain {separator!r}."
        )
    wide: dict[str, Any] = {}
    if used is not None and len(header) > _WIDE:
        # A field of the column `a` may be named as `a.b`.
        parents = {name.partition(".")[0] for name in used}
        known = set(header)
        wanted = [name for name, needed in used.items() if needed and name not in known]
        # So that an error about a column that the file lacks can name the nearest.
        near = {near for name in wanted for near in difflib.get_close_matches(name, header)}
        kept = [name for name in header if name in used or name in parents or name in near] or header[:_LISTED]
        # Fewer rows at a time: pandas holds the cells of all columns until it drops the unused ones.
        wide = {"usecols": kept, "chunksize": max(1, _CELLS // len(header))}
        header = kept
    return {
        **wide,
        "sep": separator,
        "encoding": "utf-8-sig",
        "keep_default_na": False,
        "quoting": quoting,
        **({} if has_header else {"header": None, "names": header}),
        "features": Features({name: Value("string") for name in header}),
    }
