"""Read one file, or the splits of a hub dataset, as a `datasets.Dataset`; errors name the row or line."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_peft.data.json_rows import JSON_VERSION, json_rows, json_table
from lit_peft.models.sources import PACKAGE_PREFIX, cache_error, cache_root, hub_error, resolve_packaged_file
from lit_peft.util.errors import LitPeftError, causes, closest

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
# The column of a streamed row's number.
ROW = "number of the row"
# Part of the name of every cached table: raise it when a function that makes one changes what it returns.
_TABLES_VERSION = 4
# Files of other kinds under a data file's name: how they begin, and what to do.
_COMPRESSED = (".gz", ".zip", ".bz2", ".xz", ".zst")
_FOREIGN = {
    **dict.fromkeys(
        (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"), "is compressed; unpack it"
    ),
    b"version https://git-lfs": "is only Git LFS' pointer to a file; fetch the file itself (`git lfs pull`)",
    **dict.fromkeys((b"<!DOCTYPE html", b"<!doctype html", b"<html"), "is a web page; download the file itself"),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "is UTF-16, not UTF-8; save it as UTF-8"),
}


def is_file(value: str) -> bool:
    """Tell whether a setting names a file (by prefix, suffix or existence) rather than a hub split."""
    return value.startswith(PACKAGE_PREFIX) or Path(value).suffix.lower() in LOADERS or Path(value).is_file()


def resolve_file(value: str, field: str, suffixes: Collection[str]) -> Path:
    """Return the path of a file a setting names.

    Raises:
        LitPeftError: missing, empty, or of an unknown kind.
    """
    path = resolve_packaged_file(value, field) if value.startswith(PACKAGE_PREFIX) else Path(value).expanduser()
    suffix = path.suffix.lower()
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise LitPeftError(f"{field} {value!r} {state}; give a file ({', '.join(suffixes)}).")
    if suffix not in (*suffixes, *_COMPRESSED):
        raise LitPeftError(f"{field} {value!r} is of an unknown kind {suffix!r}; use one of {', '.join(suffixes)}.")
    if path.stat().st_size == 0:
        raise LitPeftError(f"{field} {value!r} is empty (0 bytes); give a file with at least one row.")
    with path.open("rb") as stream:
        start = stream.read(32)
    foreign = next((said for opening, said in _FOREIGN.items() if start.startswith(opening)), None)
    if foreign or suffix in _COMPRESSED:
        raise LitPeftError(f"{field} {value!r} {foreign or 'has the name of a compressed file; unpack it'}.")
    return path


def read_file(
    value: str,
    field: str,
    text_column: str = "text",
    text_unit: str = "line",
    tsv: tuple[str, ...] | None = None,
) -> Dataset:
    """Read a csv, tsv, json, jsonl, parquet or txt file.

    Cells of a csv file stand apart by commas or, where its header has none, by semicolons or tabs. Every column of a
    csv or tsv file is read as text, since such a file has no types: "NA" and "007" stay as they are written, and a
    column does not change its type halfway. The parsed table is kept in the user's cache and found there again while
    the file's content is the same, whatever its name and times.

    Args:
        value: a path, or `"pkg:DISTRIBUTION/path"` for a file inside an installed package.
        field: the setting's name, for error messages ("data.train").
        text_column: how to call the one column of a txt file.
        text_unit: what is one row of a txt file: "line", "paragraph" (split at blank lines) or "document".
        tsv: for tsv files whose quotes are part of the text: the columns of one whose first line names none of them.

    Returns:
        The table, at least one row long.

    Raises:
        LitPeftError: missing, empty, of an unknown kind, not UTF-8, or broken (with its line).
    """
    path, loader, options = _how(value, field, text_unit, tsv)
    table: Dataset = _called(text_column, loader, _load(path, field, value, loader, options))
    return table


def stream_file(
    value: str,
    field: str,
    text_column: str = "text",
    text_unit: str = "line",
    tsv: tuple[str, ...] | None = None,
) -> Any:
    """Open a file that `read_file` would read whole; the rows are read as they are asked for.

    Returns:
        A `datasets.IterableDataset`, whose rows have their number, from 1, in a column `ROW`. It raises the errors of
        `read_file`.
    """
    import datasets

    path, loader, options = _how(value, field, text_unit, tsv)
    given = {"path": path.resolve(), "field": field, "value": value, "loader": loader, "options": options}
    features = None
    if loader != "json":
        with _explained(path, field, value, loader):
            features = _opened(path, loader, options).features
        features = datasets.Features({**(features or {"text": datasets.Value("string")}), ROW: datasets.Value("int64")})
    rows = datasets.IterableDataset.from_generator(_numbered, features=features, gen_kwargs=given)
    return _called(text_column, loader, rows)


def _called(text_column: str, loader: str, rows: Any) -> Any:
    """Rows whose one column, where they are lines of text, has the name that is asked for."""
    return rows.rename_column("text", text_column) if loader == "text" and text_column != "text" else rows


def _opened(path: Path, loader: str, options: dict[str, Any]) -> Any:
    import datasets

    return datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True, **options)


def _numbered(path: Path, field: str, value: str, loader: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with _explained(path, field, value, loader):
        if loader == "json":
            rows = (row for row, _ in json_rows(path, f"{field} {value!r}"))
        else:
            # Not `iter`, which shares out rows among workers.
            blocks = _opened(path, loader, options).iter(1_000)
            rows = (dict(zip(block, row, strict=True)) for block in blocks for row in zip(*block.values(), strict=True))
        number = 0
        for number, row in enumerate(rows, start=1):
            yield {**row, ROW: number}
        if not number:
            raise LitPeftError(f"{field} {value!r} has no rows; give a file with at least one row.")


@contextlib.contextmanager
def _explained(path: Path, field: str, value: str, loader: str) -> Iterator[None]:
    """Say what is wrong with a file, rather than raise the errors of pandas, pyarrow and datasets."""
    try:
        with _quiet():
            yield
    except Exception as exc:  # some of them bare ValueErrors
        raise explain(path, field, value, loader, exc) from exc


def _how(value: str, field: str, text_unit: str, tsv: tuple[str, ...] | None) -> tuple[Path, str, dict[str, Any]]:
    path = resolve_file(value, field, LOADERS)
    loader = LOADERS[path.suffix.lower()]
    if loader == "csv":
        return path, loader, _csv_options(path, field, value, tsv)
    return path, loader, {"sample_by": text_unit} if loader == "text" else {}


def read_hub(name: str, config: str | None, field: str = "data.dataset", streaming: bool = False) -> dict[str, Any]:
    """Read all splits of a hub dataset (or of a local dataset folder).

    Args:
        name: the dataset's hub id, or a folder `datasets.load_dataset` understands.
        config: its configuration, such as "sst2" of "glue".
        field: the setting's name, for error messages.
        streaming: only open it.

    Returns:
        The splits by name: `datasets.Dataset`s, or `IterableDataset`s to stream.

    Raises:
        LitPeftError: it cannot be had, and why.
    """
    import datasets

    try:
        with _quiet():
            found = datasets.load_dataset(name, config, streaming=streaming)
    except Exception as exc:  # datasets raises a dozen kinds, from ConnectionError to its own
        raise hub_error(name, exc, field=field, dataset=True) from exc
    return {str(split): table for split, table in found.items()}


def require_columns(table: Dataset, columns: dict[str, str | None], field: str, source: str) -> None:
    """Check that a table has the columns the settings name.

    Args:
        table: what was read.
        columns: setting's name -> column it names; None is skipped.
        field: the setting the table came from ("data.train").
        source: that setting's value.

    Raises:
        LitPeftError: for the first column that is missing; names those that exist.
    """
    for setting, column in columns.items():
        if column is not None and column not in table.column_names:
            raise LitPeftError(
                f"{field} {source!r} has no column {column!r} ({setting}); it has "
                f"{', '.join(map(repr, table.column_names))}; nearest: {closest(column, table.column_names, n=1)}."
            )


def column_values(table: Dataset, column: str) -> list[Any]:
    """Return one column as plain Python values, in row order.

    Raises:
        LitPeftError: a text is not UTF-8, as a damaged parquet file may hold it.
    """
    try:
        return list(table[column])
    except UnicodeDecodeError as exc:
        raise LitPeftError(f"column {column!r} holds a text that is not UTF-8 ({exc}); write its file again.") from None


def fingerprint(*parts: Any) -> str:
    """Return the name under which `datasets` caches a table made of these parts (the table before it among them)."""
    names = [_TABLES_VERSION, *(getattr(part, "_fingerprint", part) for part in parts)]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------- loading


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the traceback-like log lines of `datasets`: what failed is told by our own error."""
    from datasets.utils import logging as datasets_logging

    level = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(level)


def tables_root() -> Path:
    """Return the folder of cached tables; one for each major version of `datasets`, which reads no newer one's."""
    import datasets

    return cache_root() / "datasets" / datasets.__version__.partition(".")[0]


def _load(path: Path, field: str, value: str, loader: str, options: dict[str, Any]) -> Dataset:
    import datasets

    content = content_digest(path)
    # datasets itself goes by the file's path and time, which a changed file may keep.
    cache = tables_root() / content
    with _explained(path, field, value, loader):
        if loader == "json":
            table = json_table(path, f"{field} {value!r}", cache / f"rows-{JSON_VERSION}.arrow")
        else:
            files = {"train": str(path.resolve())}
            table = datasets.load_dataset(loader, data_files=files, split="train", cache_dir=str(cache), **options)
    if len(table) == 0:
        raise LitPeftError(f"{field} {value!r} has no rows; give a file with at least one row.")
    # What is made of the table is cached under this name.
    settings = sorted((name, str(option)) for name, option in options.items())
    table._fingerprint = fingerprint(content, loader, settings)
    return table


def content_digest(path: Path) -> str:
    """Return a hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:24]


def _csv_options(path: Path, field: str, value: str, tsv: tuple[str, ...] | None) -> dict[str, Any]:
    from datasets import Features, Value

    tabs = path.suffix.lower() == ".tsv"
    separator = "\t" if tabs else ","
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs and tsv is not None else csv.QUOTE_MINIMAL
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream, delimiter=separator, quoting=quoting), [])
            if len(header) == 1:
                # Spreadsheets write semicolons where the comma is for decimals.
                separator = next((other for other in ";\t" if other in header[0]), separator)
            stream.seek(0)
            rows = csv.reader(stream, delimiter=separator, quoting=quoting)
            header = next(rows, [])
            first = next(rows, [])
    except (UnicodeDecodeError, csv.Error) as exc:
        raise explain(path, field, value, "csv", exc) from exc
    named = not (tabs and tsv and len(header) == len(tsv) and not set(header) & set(tsv))
    header = header if named else list(tsv or ())
    if len(set(header)) < len(header) or not all(header):
        twice = sorted({name for name in header if header.count(name) > 1 or not name})
        raise LitPeftError(
            f"{field} {value!r}: the header line has empty or repeated column names ({twice}); give each a name."
        )
    if len(first) > len(header):
        # pandas would silently take the surplus columns for an index and shift all others.
        raise LitPeftError(
            f"{field} {value!r}: the first row has {len(first)} cells under a header of {len(header)} "
            f"({', '.join(map(repr, header))}); quote cells that hold {separator!r}."
        )
    return {
        "sep": separator,
        "encoding": "utf-8-sig",
        "keep_default_na": False,
        "quoting": quoting,
        **({} if named else {"header": None, "names": header}),
        "features": Features({name: Value("string") for name in header}),
    }


# ------------------------------------------------------------------------- what was wrong with the file


def explain(path: Path, field: str, value: str, loader: str, exc: BaseException) -> LitPeftError:
    """Find out why a file could not be read and say so in one paragraph."""
    if isinstance(exc, LitPeftError):
        return exc
    where = f"{field} {value!r}"
    if loader == "parquet" and _no_rows(path):
        return LitPeftError(f"{where} has no rows; give a file with at least one row.")
    if loader != "parquet" and (place := _not_utf8(path)):
        return LitPeftError(f"{where} is not UTF-8: {place}; save it as UTF-8.")
    for link in causes(exc):
        if isinstance(link, OSError) and (
            link.errno in (errno.ENOSPC, errno.EDQUOT) or str(link.filename).startswith(str(cache_root()))
        ):
            return cache_error(where, link)
    text = _chain(exc)
    if "no data" in text or "No columns to parse" in text:
        return LitPeftError(f"{where} has no rows; give a file with at least one row.")
    ragged = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", text)
    if ragged:
        expected, line, seen = ragged.groups()
        return LitPeftError(f"{where}: line {line} has {seen} cells, but the header has {expected}; quote such cells.")
    unclosed = re.search(r"EOF inside string starting at row (\d+)", text)
    if unclosed:
        return LitPeftError(f"{where}: a quote opened in row {unclosed.group(1)} is never closed.")
    if loader == "parquet":
        return LitPeftError(f"{where} is not a readable parquet file ({text[:200]}); write it again.")
    return LitPeftError(f"{where} could not be read: {text[:300]}")


def _chain(exc: BaseException) -> str:
    """The innermost messages first: the outer ones of `datasets` say only that something failed."""
    texts = [" ".join(str(link).split()) or type(link).__name__ for link in causes(exc)]
    return "; ".join(reversed(texts))


def _no_rows(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pa.parquet.ParquetFile(path).metadata.num_rows == 0
    except (pa.ArrowException, OSError, UnicodeDecodeError):  # names of columns are read as well
        return False


def _not_utf8(path: Path) -> str:
    """Return where the first byte that is not UTF-8 stands, or "" if there is none."""
    offset = 0
    with open(path, "rb") as stream:
        # A newline byte is never part of a longer UTF-8 sequence, so lines can be decoded one by one.
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as exc:
                byte = line[exc.start]
                return f"byte 0x{byte:02x} in line {number} (offset {offset + exc.start})"
            offset += len(line)
    return ""
