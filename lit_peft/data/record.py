"""What a run was trained on: the number of rows and a hash of the contents of each split."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.streaming import open_rows
from lit_peft.models.tokenization import tokenizer_digest

# Rows that are hashed at a time, and rows at the start of a stream that are hashed.
_BLOCK, STREAMED = 10_000, 1_000
# The hashes of tables that were hashed before.
_KNOWN: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def data_record(data: Any, splits: Iterable[str] = ("train", "validation")) -> dict[str, Any]:
    """Return what identifies the examples that a data module trains on, as plain data.

    The hash of a split is that of its examples: token ids, labels and references, in their order. It thus depends on
    the contents of the files (not on their paths), on the tokenizer and on the settings that make examples of rows. Of
    a stream, 1,000 rows, the first ones of each file, and the sizes of its files are hashed.

    Args:
        data: the data module, after `setup`.
        splits: the splits to describe; those that the data does not have are left out. A split `validation/NAME` goes
            with `validation`.

    Returns:
        `splits`, which maps each split to its number of `rows` (None for a stream), the `hash` of its examples, and the
        `source`, a hash of its rows before they were tokenized; `tokenizer`, a hash; and `drawn`, the settings by which
        each batch is changed at random, if the data module has any (`drawing_settings`). Empty for something that is no
        data module of lit_peft.
    """
    if not (hasattr(data, "examples") and hasattr(data, "rows")):
        return {}
    wanted = set(splits)
    found: dict[str, dict[str, Any]] = {}
    if getattr(data, "streaming", False) and "train" in wanted:
        found["train"] = {"rows": None, "hash": _stream_digest(data), "source": ""}
    for split, rows in data.rows.items():
        if split.partition("/")[0] in wanted:
            examples = data.examples(split)
            source = get_fingerprint(getattr(rows, "table", None))
            found[split] = {"rows": len(examples), "hash": examples_digest(examples), "source": source}
    drawn = {name: getattr(data, name) for name in getattr(data, "drawing_settings", ())}
    return {"splits": found, "tokenizer": tokenizer_digest(data.tokenizer)[:16], **({"drawn": drawn} if drawn else {})}


def data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return how two records of `data_record` differ, one phrase for each split; an empty list if they do not."""
    if not before.get("splits") or not now.get("splits"):
        return []
    one, other = before.get("drawn") or {}, now.get("drawn") or {}
    drawn = [
        f"data.{name} was {one[name]!r} and is {other.get(name)!r} now" for name in one if one[name] != other.get(name)
    ]
    return drawn + [
        _difference(f"data.{split}", before, now, split)
        for split in dict.fromkeys((*before["splits"], *now["splits"]))
        if _hash_of(before, split) != _hash_of(now, split)
    ]


def _hash_of(record: Mapping[str, Any], split: str) -> Any:
    return (record["splits"].get(split) or {}).get("hash")


def _difference(field: str, before: Mapping[str, Any], now: Mapping[str, Any], split: str) -> str:
    one, other = before["splits"].get(split), now["splits"].get(split)
    if one is None or other is None:
        return f"{field} was {_size(one)} and is {_size(other)} now"
    reason = ""
    if before.get("tokenizer") != now.get("tokenizer"):
        reason = "; the tokenizer or its chat template is another one"
    elif one["source"] and one["source"] == other["source"]:
        reason = "; the file is the same, so settings that make examples of its rows differ"
    elif one["rows"] == other["rows"] and one["rows"] is not None:
        reason = "; as many rows as before, but with other contents or in another order"
    return f"{field} was {_size(one)} and is {_size(other)} now{reason}"


def _size(split: Mapping[str, Any] | None) -> str:
    if split is None:
        return "not given"
    rows = "a stream" if split["rows"] is None else f"{split['rows']:,} rows"
    return f"{rows} with the hash {str(split['hash'])[:8]}"


def examples_digest(examples: Any) -> str:
    """Return a hash of the contents of examples: a table, or a list of dictionaries.

    Args:
        examples: what a data module's `examples` returns. Of a map-style dataset that is neither, the first 1,000
            examples and the number of examples are hashed.
    """
    digest = hashlib.sha256(str(len(examples)).encode())
    if not hasattr(examples, "with_format"):
        for index in range(min(len(examples), STREAMED) if not isinstance(examples, list) else len(examples)):
            digest.update(_plain(examples[index]))
        return digest.hexdigest()[:16]
    if examples not in _KNOWN:
        for block in examples.with_format("arrow").iter(_BLOCK):
            for name in sorted(block.column_names):
                digest.update(name.encode())
                _hash_array(digest, block.column(name).combine_chunks())
        _KNOWN[examples] = digest.hexdigest()[:16]
    return _KNOWN[examples]


def _hash_array(digest: Any, array: Any) -> None:
    """Add an Arrow array to a hash, whatever its offsets, its chunks, and the width of its integers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    kind = array.type
    if array.null_count:
        digest.update(b"nulls" + array.is_null().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(pc.fill_null(pc.list_value_length(array), -1).cast(pa.int64()).to_numpy().tobytes())
        _hash_array(digest, array.flatten())
    elif pa.types.is_integer(kind):
        digest.update(pc.fill_null(array, 0).cast(pa.int64()).to_numpy().tobytes())
    elif pa.types.is_floating(kind):
        digest.update(pc.fill_null(array, 0.0).cast(pa.float64()).to_numpy().tobytes())
    else:
        digest.update(_plain(array.to_pylist()))


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=_to_list).encode()


def _to_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _stream_digest(data: Any) -> str:
    """Return a hash of the first rows of each file of a stream, and of the sizes of the files."""
    digest = hashlib.sha256()
    pieces = [piece for source in open_rows(data).sources for piece in source]
    for piece in pieces:
        for row in islice(piece.rows(data), max(STREAMED // len(pieces), 1)):
            digest.update(_plain(row))
        if Path(piece.name).is_file():
            digest.update(str(Path(piece.name).stat().st_size).encode())
    return digest.hexdigest()[:16]
