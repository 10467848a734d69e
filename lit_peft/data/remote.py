"""Compressed files and files behind a URL: copies of them in the cache, which are read like any other file."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_peft.models.sources import cache_error, cache_root
from lit_peft.util.disk import whole_file
from lit_peft.util.errors import LitPeftError, first_line

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]+://")
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# The suffixes of compressed files that are read.
PACKED = (*_OPENERS, ".zst")
# A file may become this many times larger, or this many bytes large. gzip reaches at most 1,032 times.
_MOST_TIMES, _MOST_BYTES = 1_100, 2**28
_PIECE = 2**20


def is_url(value: str) -> bool:
    """Tell whether a setting is a URL, such as `s3://bucket/a.jsonl`."""
    return _URL.match(value) is not None


def inner_name(value: str) -> str:
    """Return a path or URL without the suffix of a compression and without the query: `a.jsonl` for `a.jsonl.gz`."""
    name = value.partition("?")[0] if is_url(value) else value
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in PACKED else name


def local_copy(path: str | Path, value: str, field: str) -> Path:
    """Return the file to read: the file itself, or the cached copy of a remote or compressed one.

    A copy is made once for each content of the file. Processes that need the same copy wait for the first one.

    Args:
        path: the file, or a URL.
        value: what the setting says, for error messages.
        field: the setting's name ("data.train").

    Raises:
        LitPeftError: the file cannot be fetched or unpacked, or the package that does it is missing.
    """
    local = _fetched(str(path), field) if is_url(str(path)) else Path(path).expanduser()
    if local.suffix.lower() not in PACKED or not local.is_file():
        return local
    status = local.stat()
    return _unpacked(local, f"{field} {value!r}", status.st_size, status.st_mtime_ns)


def filesystem(url: str, field: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        LitPeftError: no installed package knows this kind of URL.
    """
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as exc:
        raise LitPeftError(
            f"{field} {url!r} cannot be opened: {first_line(exc)}; install the package that fsspec names for it, or "
            "copy the file to this machine."
        ) from exc
    return found


def _fetched(url: str, field: str) -> Path:
    system, path = filesystem(url, field)
    try:
        # The file system's own description, which changes with the file: its size, time or ETag.
        key = hashlib.sha256(f"{url}\0{system.ukey(path)}".encode()).hexdigest()[:24]
        target = cache_root() / "downloads" / key / (Path(path.partition("?")[0]).name or "file")
        _make_once(target, f"{field} {url!r}", lambda temporary: system.get_file(path, str(temporary)))
    except LitPeftError:
        raise
    except Exception as exc:  # every file system has errors of its own
        reason = "it does not exist" if isinstance(exc, FileNotFoundError) else first_line(exc)
        raise LitPeftError(f"{field} {url!r} could not be read: {reason}; check the address and the access.") from exc
    return target


@lru_cache(maxsize=1024)
def _unpacked(packed: Path, where: str, size: int, _changed: int) -> Path:
    """Return the unpacked copy of a file of this size and time of change."""
    suffix = packed.suffix.lower()
    digest = hashlib.sha256()
    with packed.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    target = cache_root() / "unpacked" / digest.hexdigest()[:24] / packed.name[: -len(suffix)]
    most = max(_MOST_BYTES, _MOST_TIMES * size)

    def unpack(temporary: Path) -> None:
        total = 0
        with temporary.open("wb") as out:
            for piece in _pieces(packed, suffix, where):
                total += len(piece)
                if total > most:
                    raise LitPeftError(
                        f"{where} has more than {_MOST_TIMES:,} times its size ({size:,} bytes) when it is unpacked, "
                        "as no honest data file has; unpack it yourself if you trust it."
                    )
                out.write(piece)

    try:
        _make_once(target, where, unpack)
    except (OSError, EOFError, lzma.LZMAError) as exc:
        raise LitPeftError(f"{where} is not a readable {suffix} file: {first_line(exc)}; write it again.") from exc
    return target


def _make_once(target: Path, where: str, write: Callable[[Path], Any]) -> None:
    if target.is_file():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():
                with whole_file(target) as temporary:
                    write(temporary)
    except OSError as exc:
        if exc.errno is not None and str(exc.filename or target).startswith(str(cache_root())):
            raise cache_error(where, exc) from exc
        raise


def _zstd_pieces(packed: Path, where: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise LitPeftError(
            f"{where} is compressed with zstd, which needs a package: `pip install zstandard`, or unpack the file."
        ) from None
    reader = zstandard.ZstdDecompressor().decompressobj()
    with packed.open("rb") as stream:
        # Small pieces, because each is unpacked at once.
        while piece := stream.read(2**12):
            while piece:
                if reader.eof:  # another frame follows
                    reader = zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield reader.decompress(piece)
                except zstandard.ZstdError as exc:
                    raise OSError(str(exc)) from exc
                piece = reader.unused_data if reader.eof else b""
    if not reader.eof:
        raise EOFError("the file ends too early")


def _pieces(packed: Path, suffix: str, where: str) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _zstd_pieces(packed, where)
        return
    with _OPENERS[suffix](packed) as stream:
        while piece := stream.read(_PIECE):
            yield piece
