"""Why a data file could not be read, in one paragraph that names the line or row."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from lit_peft.models.sources import cache_error, cache_root
from lit_peft.util.errors import LitPeftError, causes


def file_error(path: Path, field: str, value: str, loader: str, exc: BaseException) -> LitPeftError:
    """Turn an exception of pandas, pyarrow or datasets into an error that names the cause in the file.

    Args:
        path: the file.
        field: the setting that names it ("data.train").
        value: that setting's value.
        loader: "csv", "json", "parquet" or "text".
        exc: what reading it raised.
    """
    # `datasets` wraps what a generator of rows raises.
    ours = next((link for link in causes(exc) if isinstance(link, LitPeftError)), None)
    if ours is not None:
        return ours
    where = f"{field} {value!r}"
    if loader == "parquet" and _is_empty_parquet(path):
        return LitPeftError(f"{where} has no rows; give a file with at least one row.")
    if loader != "parquet" and (place := _first_invalid_byte(path)):
        return LitPeftError(f"{where} is not UTF-8: {place}; save it as UTF-8.")
    for link in causes(exc):
        if isinstance(link, OSError) and (
            link.errno in (errno.ENOSPC, errno.EDQUOT) or str(link.filename).startswith(str(cache_root()))
        ):
            return cache_error(where, link)
    # The outer messages of `datasets` only say that something failed.
    messages = [" ".join(str(link).split()) or type(link).__name__ for link in causes(exc)]
    text = "; ".join(reversed(messages))
    if "no data" in text or "No columns to parse" in text:
        return LitPeftError(f"{where} has no rows; give a file with at least one row.")
    ragged = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", text)
    if ragged:
        expected, line, found = ragged.groups()
        return LitPeftError(f"{where}: line {line} has {found} cells, but the header has {expected}; quote such cells.")
    unclosed = re.search(r"EOF inside string starting at row (\d+)", text)
    if unclosed:
        return LitPeftError(f"{where}: a quote opened in row {unclosed.group(1)} is never closed; close it.")
    if loader == "parquet":
        return LitPeftError(f"{where} is not a readable parquet file ({text[:200]}); write it again.")
    return LitPeftError(f"{where} could not be read: {text[:300]}")


def _is_empty_parquet(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pa.parquet.ParquetFile(path).metadata.num_rows == 0
    except (pa.ArrowException, OSError, UnicodeDecodeError):  # column names are decoded too
        return False


def _first_invalid_byte(path: Path) -> str:
    """Return the position of the first byte that is not UTF-8, or "" if there is none."""
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
