"""The rows of json and jsonl files as a table of their own making.

The json reader of pyarrow, which `datasets` uses, takes texts for dates and dies of some broken files; `datasets` takes
some columns for traces of agents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

# Part of the name a table is kept by: raise it when files are read otherwise.
JSON_VERSION = 1
_BOM = b"\xef\xbb\xbf"
# Rows and bytes that are held at once.
_ROWS, _BYTES = 2_000, 2**23
# The type of a column whose values no single type can hold.
_MIXED = "mixed"
# Arrow writes no deeper type.
_DEEPEST = 40


def json_rows(path: Path, where: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Read the objects of a file that is a list of them, or has one to a line, or is a single one.

    A line at a time is in memory; of a list, the whole. NaN and infinity are read as null, and whole numbers of more
    than 64 bits as their digits.

    Args:
        path: the file.
        where: begins messages.

    Yields:
        A row, and its size in bytes.

    Raises:
        LitPeftError: not JSON or not an object, and where.
        UnicodeDecodeError: not UTF-8.
    """
    with path.open("rb") as stream:
        start = _first(stream)
        if start[:1] == b"[":
            yield from _whole(path, where)
            return
        stream.seek(0)
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            text = line.decode("utf-8").strip()
            if not text:
                continue
            try:
                row = _parsed(text)
            except json.JSONDecodeError as exc:
                # An object may take several lines, if it is the only one.
                if line.strip() == start and path.suffix.lower() == ".json":
                    yield from _whole(path, where)
                    return
                raise LitPeftError(
                    f"{where}: line {number} is not valid JSON (column {exc.colno}: {exc.msg})."
                ) from exc
            except RecursionError as exc:
                raise LitPeftError(f"{where}: line {number} is nested too deeply.") from exc
            if not isinstance(row, dict):
                raise LitPeftError(f"{where}: line {number} is not a JSON object ({text[:40]!r}).")
            yield row, len(line)


def json_table(path: Path, where: str, target: Path) -> Dataset:
    """Read such a file as a table, and keep this at `target`; what is there already is taken.

    Raises:
        LitPeftError, UnicodeDecodeError: as `json_rows`.
    """
    import datasets

    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        kinds: dict[str, Any] = {}
        try:
            # Columns and types show by and by; where they change, the file is read again by those found.
            while not _write(temporary, json_rows(path, where), where, kinds):
                pass
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(target))


def _first(stream: Iterable[bytes]) -> bytes:
    """The first line that is not empty, without white space."""
    return next((text for line in stream if (text := line.removeprefix(_BOM).strip())), b"")


def _whole(path: Path, where: str) -> Iterator[tuple[dict[str, Any], int]]:
    data = path.read_bytes().removeprefix(_BOM)
    try:
        found = _parsed(data.decode("utf-8"))
    except json.JSONDecodeError as exc:
        raise LitPeftError(f"{where}: broken JSON at line {exc.lineno}, column {exc.colno}: {exc.msg}.") from exc
    except RecursionError as exc:
        raise LitPeftError(f"{where} is nested too deeply.") from exc
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise LitPeftError(f"{where}: row {number} is not a JSON object ({json.dumps(row)[:40]!r}).")
        yield row, len(data) // len(rows)


def _integer(text: str) -> int | str:
    number = int(text) if len(text) < 21 else 2**63
    return number if -(2**63) <= number < 2**63 else text


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_integer, parse_constant=lambda _: None)


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


def _write(target: Path, rows: Iterable[tuple[dict[str, Any], int]], where: str, kinds: dict[str, Any]) -> bool:
    """Write rows as an Arrow stream, in columns of the types known so far.

    Returns:
        Whether these types hold for all rows; else they are now those that do.
    """
    import pyarrow as pa

    done, holds = 0, True
    writer: Any = None
    try:
        for block in _blocks(rows):
            columns = {name: [row.get(name) for row in block] for name in dict.fromkeys(chain(kinds, *block))}
            try:
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
            except UnicodeEncodeError as exc:
                row = next(at for at, row in enumerate(block, start=1) if not _encodes(row))
                raise LitPeftError(
                    f"{where}: row {done + row} holds half of a surrogate pair ({exc.object[exc.start]!r}), which is "
                    "no text; remove it."
                ) from exc
            done += len(block)
        if writer is None:
            raise LitPeftError(f"{where} has no rows; give a file with at least one row.")
    finally:
        if writer is not None:
            writer.close()
    return holds


def _encodes(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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

    mixed = getattr(datasets, "Json", lambda: datasets.Value("string"))
    plain = pa.schema([(name, pa.null() if kind == _MIXED else kind) for name, kind in kinds.items()])
    features = datasets.Features.from_arrow_schema(plain)
    features.update({name: mixed() for name, kind in kinds.items() if kind == _MIXED})
    return features.arrow_schema


def _array(values: list[Any], kind: Any, stored: Any) -> Any:
    import pyarrow as pa

    if kind == _MIXED:
        return pa.array([None if value is None else json.dumps(value) for value in values], stored)
    return pa.array(values, stored)
