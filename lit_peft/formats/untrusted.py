"""Reading files that come from someone else: bounded in size, never code, nothing outside their folder."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

# An adapter's settings are a few KB; a safetensors header has about 100 bytes for each tensor.
MAX_JSON = MAX_HEADER = 16 * 2**20
# Python's regular expressions take exponential time where repeats are nested, polynomial where they follow each other.
_MAX_REPEATS = 6
_MATCH_SECONDS = 4


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` of a folder, None if it is not there.

    Raises:
        LitPeftError: it is a link to a place outside of the folder (the hub's cache, with its `blobs` beside the
            snapshots, excepted), or not a plain file.
    """
    path = folder / name
    if not path.exists():
        return None
    root, real = folder.resolve(), path.resolve()
    cached = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (root, *cached)):
        raise LitPeftError(f"{path} is a link out of its folder and is not read: copy the file into the folder.")
    if not real.is_file():
        raise LitPeftError(f"{path} is not a plain file: give the folder of an adapter.")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a folder's JSON file, None if there is no such file.

    Raises:
        LitPeftError: it is too large, not valid JSON, names a key twice, holds a number JSON does not have, or is no
            object.
    """
    path = inside(folder, name)
    if path is None:
        return None
    if path.stat().st_size > MAX_JSON:
        raise LitPeftError(f"{path} has {path.stat().st_size:,} bytes, too many for settings ({MAX_JSON:,} at most).")
    return parse_object(path.read_bytes(), path)


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """The object that JSON from `path` holds. Raises as `read_json`."""
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        raise LitPeftError(f"{path} is not valid JSON ({first_line(problem)}).") from None
    if not isinstance(values, dict):
        raise LitPeftError(f"{path} holds no settings: give the folder of an adapter.")
    return values


def read_tensors(folder: Path, safe: str, pickled: str | None = None) -> dict[str, Tensor] | None:
    """The tensors in a folder's safetensors file, or else in its pickled one; None if neither is there.

    Nothing is unpickled but plain tensors. The safetensors file is mapped, not read: what does not fit the model is
    refused by its shape before its bytes are touched.

    Raises:
        LitPeftError: a file is not what its name says, or would take more memory than it has bytes.
    """
    path = inside(folder, safe)
    if path is not None:
        _check_header(path)
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError, OSError) as problem:
            raise LitPeftError(f"{path} is not a valid safetensors file ({first_line(problem)}).") from None
    path = inside(folder, pickled) if pickled else None
    if path is None:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        _refuse_pickle(path, "an old or broken format")
    if (
        any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        or sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        _refuse_pickle(path, "it would unpack to more than it has bytes")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch's reader raises what the bytes make it stumble over
        _refuse_pickle(path, type(problem).__name__)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        _refuse_pickle(path, "it holds other things than named tensors")
    return found


def check_sizes(stored: Mapping[str, Tensor], sizes: Mapping[str, float | None], where: str) -> None:
    """Refuse settings that would make something larger than what a folder holds, before memory is taken for it.

    Args:
        stored: the folder's tensors.
        sizes: settings that say how large one of them is, by name.
        where: the file the settings are from.

    Raises:
        LitPeftError: one is larger than the largest tensor.
    """
    largest = max([0, *(tensor.numel() for tensor in stored.values())])
    for name, size in sizes.items():
        if size is not None and size > largest:
            raise LitPeftError(
                f"{where}: {name}={brief(size)} is more than the stored tensors have ({largest} numbers at most): the "
                "folder is not whole."
            )


def check_weights(name: str, tensor: Tensor, folder: Path) -> None:
    """Check that a tensor holds weights.

    Raises:
        LitPeftError: it holds no real numbers, or NaN or infinite ones.
    """
    if not tensor.is_floating_point():
        raise LitPeftError(
            f"{folder}: {name} is of type {tensor.dtype}, and weights are floating-point numbers: the file is not one "
            "that training wrote."
        )
    # torch cannot ask this of every type of 8 bits.
    if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
        raise LitPeftError(
            f"{folder}: {name} holds NaN or infinite numbers, so the model would answer nonsense: the training that "
            "wrote it failed; use an earlier checkpoint."
        )


def is_quick(pattern: str, where: str) -> bool:
    """Whether a regular expression from a foreign file is quick on any name; what is not, is for `matching`.

    Raises:
        LitPeftError: it is not valid, or too long.
    """
    if len(pattern) > 10_000:
        raise LitPeftError(f"{where} has a regular expression of {len(pattern):,} letters: name the modules instead.")
    try:
        repeats = _repeats(re._parser.parse(pattern), False)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as problem:
        raise LitPeftError(f"{where} has the regular expression {pattern[:80]!r}: {first_line(problem)}.") from None
    return repeats <= _MAX_REPEATS


def matching(patterns: list[str], names: list[str], where: str) -> list[list[str]]:
    """For each of several regular expressions the names that it matches whole.

    They are found in a process of its own, which has limited time for all of them.

    Raises:
        LitPeftError: it takes longer than that.
    """
    ask = (
        "import json, re, sys; patterns, names = json.load(sys.stdin); "
        "print([[n for n, name in enumerate(names) if re.fullmatch(p, name)] for p in patterns])"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", ask],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=_MATCH_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        count = f"{len(patterns)} regular expressions as" if len(patterns) > 1 else "the regular expression"
        raise LitPeftError(
            f"{where} has {count} {patterns[0][:80]!r}, which takes forever on this model's names: name the modules "
            "instead."
        ) from None
    return [[names[number] for number in found] for found in json.loads(done.stdout)]


def _repeats(parsed: Any, inside_repeat: bool) -> float:
    """The most open-ended repeats on one way through an expression; infinite where they are nested."""
    total: float = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inner = argument
            many = most > 16
            if many and inside_repeat:
                return math.inf
            total += many + _repeats(inner, inside_repeat or many)
        elif name == "BRANCH":
            total += max(_repeats(way, inside_repeat) for way in argument[1])
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            total += _repeats(argument if name == "ATOMIC_GROUP" else argument[-1], inside_repeat)
        elif name == "GROUPREF_EXISTS":
            total += sum(_repeats(way, inside_repeat) for way in argument[1:] if way is not None)
    return total


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise LitPeftError(
                f"{path} is not a valid safetensors file: {size:,} bytes with a header of {length:,} declared."
            )
        parse_object(file.read(length), path)


def _refuse_pickle(path: Path, why: str) -> NoReturn:
    raise LitPeftError(
        f"{path} is not a plain file of tensors and is not read, since it could run code ({why}): save the adapter "
        "again as safetensors."
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")
