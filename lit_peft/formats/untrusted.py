"""Reading files that somebody else wrote: limited in size, never run as code, nothing outside of their folder."""

from __future__ import annotations

import json
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


def inside(folder: Path, name: str) -> Path | None:
    """Return the path of the file `name` in a folder; None if there is none.

    Raises:
        LitPeftError: it is a link out of the folder (except in the hub's cache, where files are links to `blobs`), or
            not a plain file.
    """
    path = folder / name
    if not path.exists():
        return None
    root, real = folder.resolve(), path.resolve()
    cached = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (root, *cached)):
        raise LitPeftError(f"{path} is a link out of its folder, so it is not read: copy the file into the folder.")
    if not real.is_file():
        raise LitPeftError(f"{path} is not a plain file: give the folder of an adapter.")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the object in a folder's JSON file; None if there is no such file.

    Raises:
        LitPeftError: it is too large, is not valid JSON (NaN and infinity included), repeats a key, or is no object.
    """
    path = inside(folder, name)
    if path is None:
        return None
    if path.stat().st_size > MAX_JSON:
        raise LitPeftError(f"{path} has {path.stat().st_size:,} bytes; settings have at most {MAX_JSON:,}.")
    return parse_object(path.read_bytes(), path)


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """Return the object in the JSON text of a file.

    Raises:
        LitPeftError: see `read_json`.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        raise LitPeftError(f"{path} is not valid JSON ({first_line(problem)}).") from None
    if not isinstance(values, dict):
        raise LitPeftError(f"{path} is no JSON object: give the folder of an adapter.")
    return values


def read_tensors(folder: Path, safe: str, pickled: str | None = None) -> dict[str, Tensor] | None:
    """Return the tensors in a folder's safetensors file, or else in its pickled file; None if it has neither.

    Only plain tensors are unpickled. The safetensors file is mapped into memory, so that tensors that do not fit the
    model can be refused by their shape before their bytes are read.

    Raises:
        LitPeftError: a file is not of the format of its name, or would need more memory than it has bytes.
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
        _refuse_pickle(path, "it would unpack to more bytes than it has")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # damaged bytes make torch's reader raise almost anything
        _refuse_pickle(path, type(problem).__name__)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        _refuse_pickle(path, "it has values that are not named tensors")
    return found


def check_sizes(stored: Mapping[str, Tensor], sizes: Mapping[str, float | None], where: str) -> None:
    """Refuse settings that would create something larger than the folder's tensors, before memory is allocated.

    Args:
        stored: the folder's tensors.
        sizes: settings that are a size of one of the tensors, by name.
        where: the file that the settings are from, for the message.

    Raises:
        LitPeftError: a size is larger than the largest tensor.
    """
    largest = max([0, *(tensor.numel() for tensor in stored.values())])
    for name, size in sizes.items():
        if size is not None and size > largest:
            raise LitPeftError(
                f"{where}: {name}={brief(size)} is more than the largest stored tensor has ({largest} elements): the "
                "folder is incomplete."
            )


def check_weights(name: str, tensor: Tensor, folder: Path) -> None:
    """Check that a tensor can be a weight.

    Raises:
        LitPeftError: it is not of a floating-point dtype, or has NaN or infinite elements.
    """
    if not tensor.is_floating_point():
        raise LitPeftError(
            f"{folder}: {name} has the dtype {tensor.dtype}, but weights are floating-point numbers: the file was not "
            "written by training."
        )
    # torch's isfinite does not support all 8-bit dtypes.
    if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
        raise LitPeftError(
            f"{folder}: {name} has NaN or infinite elements, so the model would give meaningless answers. Training has "
            "probably diverged: use an earlier checkpoint."
        )


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise LitPeftError(
                f"{path} is not a valid safetensors file: it has {size:,} bytes and declares a header of {length:,}."
            )
        parse_object(file.read(length), path)


def _refuse_pickle(path: Path, why: str) -> NoReturn:
    raise LitPeftError(
        f"{path} is not a plain file of tensors, so it is not read, because it could run code ({why}): save the "
        "adapter as safetensors."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {brief(name)} occurs twice")
            seen.add(name)
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
