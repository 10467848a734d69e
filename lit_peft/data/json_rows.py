"""json and jsonl files to rows and tables.

The json reader of pyarrow, which `datasets` uses, reads some texts as dates and crashes on some broken files, and
`datasets` treats some columns as agent traces; so json is read here.
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

# Part of the name of a cached table: raise it when files are read differently.
JSON_VERSION = 2
_BOM = b"\xef\xbb\xbf"
# Maximum rows and bytes of a block.
_BLOCK_ROWS, _BLOCK_BYTES = 2_000, 2**23
# Characters of a list that are read at once. An error this near their end may be an object that continues after them.
_CHARACTERS, _NEAR_END = 2**20, 16
# Bytes of a line whose length is said when it is broken.
_LONG = 2**20
_END = object()
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# The type of a column whose values have no common type.
_MIXED = "mixed"
# Objects whose members differ from row to row and must stay as they are, because chat templates print them: columns of
# these names, and columns with this member.
_PRINTED_COLUMNS, _PRINTED_MEMBER = ("tools", "documents", "chat_template_kwargs"), "tool_calls:"
# Arrow cannot write types nested more deeply.
_MAX_DEPTH = 40


def json_rows(path: Path, where: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Read the objects of a file that is a list of objects, has one object per line, or is a single object.

    One object at a time is in memory, with some text around it. NaN and infinity are read as null, and whole numbers of
    more than 64 bits as text.

    Args:
        path: the file.
        where: start of error messages.

    Yields:
        A row and its size in bytes (in a list: in characters).

    Raises:
        LitPeftError: the file is not valid JSON, has something that is not an object, or has no rows.
        UnicodeDecodeError: the file is not UTF-8.
    """
    with path.open("rb") as stream:
        start = _first_text(stream)
    rows = _list_rows(path, where) if start[:1] == b"[" else _line_rows(path, where, start)
    if (first := next(rows, None)) is None:
        raise LitPeftError(f"{where} has no rows; give a file with at least one row.")
    yield first
    yield from rows


def json_table(path: Path, where: str, target: Path) -> Dataset:
    """Read such a file as a table, cached at `target`.

    Raises:
        LitPeftError, UnicodeDecodeError: as `json_rows`.
    """
    import datasets

    if not target.is_file():
        with whole_file(target) as temporary:
            types: dict[str, Any] = {}
            # Later rows may have new columns and types; then the file is read again with all that were found.
            while not _write_table(temporary, json_rows(path, where), types):
                pass
    return datasets.Dataset.from_file(str(target))


def table_of(columns: dict[str, list[Any]]) -> Dataset:
    """Make a table from columns in memory, with the types that `json_table` would give the rows."""
    import datasets
    import pyarrow as pa

    types = {name: _common_type(name, None, values) for name, values in columns.items()}
    schema = _schema(types)
    arrays = [_array(columns[field.name], types[field.name], field.type) for field in schema]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_arrays(arrays, schema=schema)))


def _first_text(stream: Iterable[bytes]) -> bytes:
    """Return the first line that is not empty, without white space."""
    return next((text for line in stream if (text := line.removeprefix(_BOM).strip())), b"")


def _line_rows(path: Path, where: str, start: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Read a file with one object per line, or with a single object; `start` is its first line."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            text = line.decode("utf-8").strip()
            if not text:
                continue
            try:
                row = _DECODER.decode(text)
            except json.JSONDecodeError as exc:
                # A single object may span several lines.
                if line.strip() == start and path.suffix.lower() == ".json":
                    yield _single_row(path, where)
                    return
                size = f" ({len(raw):,} bytes; is a line break missing?)" if len(raw) > _LONG else ""
                raise LitPeftError(
                    f"{where}: line {number}{size} is not valid JSON (column {exc.colno}: {exc.msg})."
                ) from exc
            except RecursionError as exc:
                raise LitPeftError(f"{where}: line {number} is nested too deeply.") from exc
            yield _require_object(row, text, f"{where}: line {number}"), len(line)


def _single_row(path: Path, where: str) -> tuple[dict[str, Any], int]:
    """Read a file that is a single object."""
    text = path.read_bytes().removeprefix(_BOM).decode("utf-8")
    try:
        return _require_object(_DECODER.decode(text), text, f"{where}: row 1"), len(text)
    except json.JSONDecodeError as exc:
        raise LitPeftError(f"{where}: broken JSON at line {exc.lineno}, column {exc.colno}: {exc.msg}.") from exc
    except RecursionError as exc:
        raise LitPeftError(f"{where} is nested too deeply.") from exc


def _list_rows(path: Path, where: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Read a file that is a list of objects."""
    number = lines = column = position = 0
    with path.open(encoding="utf-8-sig", newline="") as stream:
        text = stream.read(_CHARACTERS)
        while True:
            try:
                found, start, end = _next_element(text, position, number == 0)
            except json.JSONDecodeError as exc:
                incomplete = exc.pos > len(text) - _NEAR_END or exc.msg.startswith("Unterminated")
                # A long object is read in ever larger pieces.
                if incomplete and (more := stream.read(max(_CHARACTERS, len(text) - position))):
                    lines += text.count("\n", 0, position)
                    column = position - text.rfind("\n", 0, position) - 1 + (0 if "\n" in text[:position] else column)
                    text, position = text[position:] + more, 0
                    continue
                place = exc.colno + (column if exc.lineno == 1 else 0)
                raise LitPeftError(
                    f"{where}: broken JSON at line {lines + exc.lineno}, column {place}: {exc.msg}."
                ) from exc
            except RecursionError as exc:
                raise LitPeftError(f"{where}: row {number + 1} is nested too deeply.") from exc
            if found is _END:
                if rest := (text[end:] + stream.read()).strip():
                    raise LitPeftError(f"{where}: there is text after the end of the list: {rest[:40]!r}; remove it.")
                return
            number += 1
            yield _require_object(found, text[start:end], f"{where}: row {number}"), end - start
            position = end


def _next_element(text: str, position: int, first: bool) -> tuple[Any, int, int]:
    """Return the next element of a list after a position, or `_END`, and the element's start and end.

    Raises:
        json.JSONDecodeError: the element is broken, or continues after the text.
    """
    position = _skip_white_space(text, position)
    if first:
        position = _skip_white_space(text, position + 1)
    if text[position : position + 1] == "]":
        return _END, position, position + 1
    if not first:
        if text[position : position + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _skip_white_space(text, position + 1)
    found, end = _DECODER.raw_decode(text, position)
    return found, position, end


def _skip_white_space(text: str, position: int) -> int:
    return _WHITE_SPACE.match(text, position).end()  # type: ignore[union-attr]


def _require_object(row: Any, text: str, where: str) -> dict[str, Any]:
    """Return a row.

    Raises:
        LitPeftError: it is not an object, or its text cannot be written as UTF-8.
    """
    if not isinstance(row, dict):
        raise LitPeftError(f"{where} is not a JSON object ({text[:40]!r}).")
    if _SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise LitPeftError(
                f"{where} has half of a surrogate pair ({exc.object[exc.start]!r}), which is not valid text; remove it."
            ) from exc
    return row


def _integer(text: str) -> int | str:
    number = int(text) if len(text) < 21 else 2**63
    return number if -(2**63) <= number < 2**63 else text


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=lambda _: None)


def _blocks(rows: Iterable[tuple[dict[str, Any], int]]) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    total = 0
    for row, size in rows:
        block.append(row)
        total += size
        if len(block) == _BLOCK_ROWS or total >= _BLOCK_BYTES:
            yield block
            block, total = [], 0
    if block:
        yield block


def _write_table(target: Path, rows: Iterable[tuple[dict[str, Any], int]], types: dict[str, Any]) -> bool:
    """Write rows as an Arrow stream, in columns of the types that are known so far.

    Args:
        target: the file to write.
        rows: the rows and their sizes.
        types: the type of each column; it is updated to the types of all rows.

    Returns:
        Whether the types fitted all rows; if not, the file is incomplete.
    """
    import pyarrow as pa

    fits = True
    writer: Any = None
    try:
        for block in _blocks(rows):
            columns = {name: [row.get(name) for row in block] for name in dict.fromkeys(chain(types, *block))}
            for name, values in columns.items():
                common = _common_type(name, types.get(name), values)
                fits = fits and (writer is None or common == types.get(name))
                types[name] = common
            if writer is None:
                schema = _schema(types)
                writer = pa.ipc.new_stream(str(target), schema)
            if fits:
                arrays = [_array(columns[field.name], types[field.name], field.type) for field in schema]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    finally:
        if writer is not None:
            writer.close()
    return fits


def _common_type(name: str, known: Any, values: list[Any]) -> Any:
    """Return the common type of a column's values and of a type that is known already, or `_MIXED`."""
    import pyarrow as pa

    if known == _MIXED:
        return _MIXED
    try:
        found = pa.array(values).type
        if known is not None and found != known:
            pair = [pa.schema([("values", one)]) for one in (known, found)]
            found = pa.unify_schemas(pair, promote_options="permissive").field(0).type
            pa.array(values, found)
    except pa.ArrowException:
        return _MIXED
    text = str(found)
    printed = ("<" in text and name in _PRINTED_COLUMNS) or _PRINTED_MEMBER in text
    return _MIXED if printed or text.count("<") > _MAX_DEPTH else found


def _schema(types: dict[str, Any]) -> Any:
    """Return the schema of a table with columns of these types, in the form that `datasets` reads."""
    import datasets
    import pyarrow as pa

    plain = pa.schema([(name, pa.null() if found == _MIXED else found) for name, found in types.items()])
    features = datasets.Features.from_arrow_schema(plain)
    features.update({name: datasets.Json() for name, found in types.items() if found == _MIXED})
    return features.arrow_schema


def _array(values: list[Any], found: Any, stored: Any) -> Any:
    """Return values as an Arrow array of the stored type; mixed values are stored as JSON."""
    import pyarrow as pa

    if found == _MIXED:
        return pa.array([None if value is None else json.dumps(value) for value in values], stored)
    return pa.array(values, stored)
