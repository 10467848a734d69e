"""The rows of json and jsonl files as a table of their own making.

The json reader of pyarrow, which `datasets` uses, takes texts for dates and dies of some broken files; `datasets` takes
some columns for traces of agents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.util.disk import whole_file
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

# Part of the name a table is kept by: raise it when files are read otherwise.
JSON_VERSION = 1
_BOM = b"\xef\xbb\xbf"
# Rows and bytes that are held at once.
_ROWS, _BYTES = 2_000, 2**23
# Characters of a list that are read at once, and how near their end an object breaks off that goes on after it.
_CHARACTERS, _HALF = 2**20, 16
_END = object()
_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# The type of a column whose values no single type can hold.
_MIXED = "mixed"
# Arrow writes no deeper type.
_DEEPEST = 40


def json_rows(path: Path, where: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Read the objects of a file that is a list of them, or has one to a line, or is a single one.

    An object, and some text about it, is in memory at a time. NaN and infinity are read as null, and whole numbers of
    more than 64 bits as their digits.

    Args:
        path: the file.
        where: begins messages.

    Yields:
        A row, and its size in bytes (of a list, in characters).

    Raises:
        LitPeftError: not JSON, not an object or not all text, and where; or no rows.
        UnicodeDecodeError: not UTF-8.
    """
    with path.open("rb") as stream:
        start = _first(stream)
    rows = _listed(path, where) if start[:1] == b"[" else _lines(path, where, start)
    if (first := next(rows, None)) is None:
        raise LitPeftError(f"{where} has no rows; give a file with at least one row.")
    yield first
    yield from rows


def json_table(path: Path, where: str, target: Path) -> Dataset:
    """Read such a file as a table, and keep this at `target`; what is there already is taken.

    Raises:
        LitPeftError, UnicodeDecodeError: as `json_rows`.
    """
    import datasets

    if not target.is_file():
        with whole_file(target) as temporary:
            kinds: dict[str, Any] = {}
            # Columns and types show by and by; where they change, the file is read again by those found.
            while not _write(temporary, json_rows(path, where), kinds):
                pass
    return datasets.Dataset.from_file(str(target))


def table_of(columns: dict[str, list[Any]]) -> Dataset:
    """Make a table of columns in memory, of the types that `json_table` gives such rows."""
    import datasets
    import pyarrow as pa

    kinds = {name: _kind(None, values) for name, values in columns.items()}
    schema = _schema(kinds)
    arrays = [_array(columns[field.name], kinds[field.name], field.type) for field in schema]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_arrays(arrays, schema=schema)))


def _first(stream: Iterable[bytes]) -> bytes:
    """The first line that is not empty, without white space."""
    return next((text for line in stream if (text := line.removeprefix(_BOM).strip())), b"")


def _lines(path: Path, where: str, start: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of a file with one to a line, or with just one; `start` is its first line."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            text = line.decode("utf-8").strip()
            if not text:
                continue
            try:
                row = _DECODER.decode(text)
            except json.JSONDecodeError as exc:
                # An object may take several lines, if it is the only one.
                if line.strip() == start and path.suffix.lower() == ".json":
                    yield _only(path, where)
                    return
                raise LitPeftError(
                    f"{where}: line {number} is not valid JSON (column {exc.colno}: {exc.msg})."
                ) from exc
            except RecursionError as exc:
                raise LitPeftError(f"{where}: line {number} is nested too deeply.") from exc
            yield _checked(row, text, f"{where}: line {number}"), len(line)


def _only(path: Path, where: str) -> tuple[dict[str, Any], int]:
    """The object that is a whole file."""
    text = path.read_bytes().removeprefix(_BOM).decode("utf-8")
    try:
        return _checked(_DECODER.decode(text), text, f"{where}: row 1"), len(text)
    except json.JSONDecodeError as exc:
        raise LitPeftError(f"{where}: broken JSON at line {exc.lineno}, column {exc.colno}: {exc.msg}.") from exc
    except RecursionError as exc:
        raise LitPeftError(f"{where} is nested too deeply.") from exc


def _listed(path: Path, where: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of a file that is one list."""
    number = lines = column = at = 0
    with path.open(encoding="utf-8-sig", newline="") as stream:
        text = stream.read(_CHARACTERS)
        while True:
            try:
                found, start, end = _element(text, at, number == 0)
            except json.JSONDecodeError as exc:
                half = exc.pos > len(text) - _HALF or exc.msg.startswith("Unterminated")
                # Of a long object, ever more is read at once.
                if half and (new := stream.read(max(_CHARACTERS, len(text) - at))):
                    lines += text.count("\n", 0, at)
                    column = at - text.rfind("\n", 0, at) - 1 + (0 if "\n" in text[:at] else column)
                    text, at = text[at:] + new, 0
                    continue
                place = exc.colno + (column if exc.lineno == 1 else 0)
                raise LitPeftError(
                    f"{where}: broken JSON at line {lines + exc.lineno}, column {place}: {exc.msg}."
                ) from exc
            except RecursionError as exc:
                raise LitPeftError(f"{where}: row {number + 1} is nested too deeply.") from exc
            if found is _END:
                if rest := (text[end:] + stream.read()).strip():
                    raise LitPeftError(f"{where}: more stands after the end of the list: {rest[:40]!r}; remove it.")
                return
            number += 1
            yield _checked(found, text[start:end], f"{where}: row {number}"), end - start
            at = end


def _element(text: str, at: int, first: bool) -> tuple[Any, int, int]:
    """The next element of a list after `at`, or `_END`, and where it begins and ends.

    Raises:
        json.JSONDecodeError: it is broken, or goes on after the text.
    """
    at = _blank(text, at)
    if first:
        at = _blank(text, at + 1)
    if text[at : at + 1] == "]":
        return _END, at, at + 1
    if not first:
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _blank(text, at + 1)
    found, end = _DECODER.raw_decode(text, at)
    return found, at, end


def _blank(text: str, at: int) -> int:
    """Where the white space that begins at `at` ends."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _checked(row: Any, text: str, where: str) -> dict[str, Any]:
    """A row, if it is an object of texts.

    Raises:
        LitPeftError: it is not.
    """
    if not isinstance(row, dict):
        raise LitPeftError(f"{where} is not a JSON object ({text[:40]!r}).")
    if _SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise LitPeftError(
                f"{where} holds half of a surrogate pair ({exc.object[exc.start]!r}), which is no text; remove it."
            ) from exc
    return row


def _integer(text: str) -> int | str:
    number = int(text) if len(text) < 21 else 2**63
    return number if -(2**63) <= number < 2**63 else text


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=lambda _: None)


def _blocks(rows: Iterable[tuple[dict[str, Any], int]]) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    held = 0
    for row, size in rows:
        block.append(row)
        held += size
        if len(block) == _ROWS or held >= _BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


def _write(target: Path, rows: Iterable[tuple[dict[str, Any], int]], kinds: dict[str, Any]) -> bool:
    """Write rows as an Arrow stream, in columns of the types known so far.

    Returns:
        Whether these types hold for all rows; else they are now those that do.
    """
    import pyarrow as pa

    holds = True
    writer: Any = None
    try:
        for block in _blocks(rows):
            columns = {name: [row.get(name) for row in block] for name in dict.fromkeys(chain(kinds, *block))}
            for name, values in columns.items():
                kind = _kind(kinds.get(name), values)
                holds = holds and (writer is None or kind == kinds.get(name))
                kinds[name] = kind
            if writer is None:
                schema = _schema(kinds)
                writer = pa.ipc.new_stream(str(target), schema)
            if holds:
                arrays = [_array(columns[field.name], kinds[field.name], field.type) for field in schema]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    finally:
        if writer is not None:
            writer.close()
    return holds


def _kind(known: Any, values: list[Any]) -> Any:
    """Return the type that holds the values, and those of a type known before."""
    import pyarrow as pa

    if known == _MIXED:
        return _MIXED
    try:
        kind = pa.array(values).type
        if known is not None and kind != known:
            pair = [pa.schema([("values", one)]) for one in (known, kind)]
            kind = pa.unify_schemas(pair, promote_options="permissive").field(0).type
            pa.array(values, kind)
    except pa.ArrowException:
        return _MIXED
    return _MIXED if str(kind).count("<") > _DEEPEST else kind


def _schema(kinds: dict[str, Any]) -> Any:
    """The schema of a table of columns of these types, as `datasets` reads it."""
    import datasets
    import pyarrow as pa

    plain = pa.schema([(name, pa.null() if kind == _MIXED else kind) for name, kind in kinds.items()])
    features = datasets.Features.from_arrow_schema(plain)
    features.update({name: datasets.Json() for name, kind in kinds.items() if kind == _MIXED})
    return features.arrow_schema


def _array(values: list[Any], kind: Any, stored: Any) -> Any:
    import pyarrow as pa

    if kind == _MIXED:
        return pa.array([None if value is None else json.dumps(value) for value in values], stored)
    return pa.array(values, stored)
