"""Reading files that somebody else wrote: limited in size, never run as code, nothing outside of their folder."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

# An adapter's settings are a few KB; a safetensors header has about 100 bytes for each tensor.
MAX_JSON, MAX_HEADER = 4 * 2**20, 8 * 2**20
MAX_TENSORS, MAX_PARTS = 30_000, 300_000
# The list of what is in a pickled file has about 80 bytes for each tensor, and so has the pickle itself.
MAX_DIRECTORY, MAX_PICKLE = 2**21, 2**21
# Names of modules that a folder can list to be trained in full: each is compared with all modules of the model.
MAX_NAMES = 1000
# How many elements more than it stores a folder can make a model allocate: 16 MB in float32.
SPARE_ELEMENTS = 2**22
# What layers create their parameters with.
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}


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
    if max(text.count(b":"), text.count(b"[") + text.count(b"{")) > MAX_PARTS:
        raise LitPeftError(f"{path} has more than {MAX_PARTS:,} values, so it is not read.")
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
        found = read_pickle(path)
    except ValueError as problem:
        raise LitPeftError(
            f"{path} is not a plain file of tensors, so it is not read, because it could run code ({problem}): save "
            "the adapter as safetensors."
        ) from None
    if not is_tensors(found):
        raise LitPeftError(
            f"{path} is not a plain file of tensors (it has values that are not named tensors): save the adapter as "
            "safetensors."
        )
    return found


def read_pickle(path: Path) -> Any:
    """Return the plain data and tensors in a file of `torch.save`. No code in it is executed.

    Raises:
        ValueError: the file has something else, is damaged or of the old format, or would unpack to more bytes than it
            has; the message says which.
    """
    try:
        size, directory = path.stat().st_size, _directory_size(path)
        if directory > MAX_DIRECTORY:
            raise ValueError(f"it lists its parts in {directory:,} bytes")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, struct.error):
        raise ValueError("it is damaged, or of the format before PyTorch 1.6") from None
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise ValueError("it would unpack to more bytes than it has")
    if any(entry.file_size > MAX_PICKLE for entry in entries if entry.filename.endswith(".pkl")):
        raise ValueError(f"its data without the tensors has more than {MAX_PICKLE:,} bytes")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # damaged bytes make torch's reader raise almost anything
        # torch's own message recommends to execute the file.
        kind = type(problem).__name__
        raise ValueError(f"it is damaged or has more than plain data and tensors: {kind}") from None


def is_tensors(values: Any) -> bool:
    """Return whether a value is a dictionary of plain tensors in memory by name, each no larger than its storage."""
    return isinstance(values, dict) and all(
        isinstance(name, str)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
        # A stride of 0 makes a tensor of any size from one number.
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        for name, value in values.items()
    )


def _directory_size(path: Path) -> int:
    """Return how many bytes the list of a zip archive's parts has, without reading it.

    Raises:
        zipfile.BadZipFile: the file does not end as an archive without a comment does.
    """
    with path.open("rb") as file:
        file.seek(-min(98, path.stat().st_size), 2)
        end = file.read()
    if end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise zipfile.BadZipFile
    size: int = struct.unpack("<I", end[-10:-6])[0]
    # The record of archives with many or large parts is before, and the place of that record in between.
    if end[-42:-38] == b"PK\6\7" and end[-98:-94] == b"PK\6\6":
        size = max(size if size < 2**32 - 1 else 0, struct.unpack("<Q", end[-58:-50])[0])
    return size


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


class ElementLimit(TorchFunctionMode):
    """Within it, tensors with many more elements than a folder stores are refused before they are created.

    Args:
        stored: the folder's tensors.
        where: the file that the settings are from, for the message.
        spare: how many elements more than are stored may be created.

    Raises:
        LitPeftError: there would be more.
    """

    def __init__(self, stored: Mapping[str, Tensor], where: str, spare: int = SPARE_ELEMENTS) -> None:
        super().__init__()
        self.stored, self.where = sum(tensor.numel() for tensor in stored.values()), where
        self.left = self.stored + spare

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
            self.left -= math.prod(int(size) for size in sizes)
            if self.left < 0:
                raise LitPeftError(
                    f"{self.where}: on this model, the settings need many more elements than the {self.stored:,} that "
                    "are stored: the folder is incomplete."
                )
        return func(*args, **(kwargs or {}))


def check_names(names: Any, where: str) -> None:
    """Refuse a list of names that would take long to compare with all modules of a model.

    Raises:
        LitPeftError: it has more than `MAX_NAMES`.
    """
    if isinstance(names, Collection) and len(names) > MAX_NAMES:
        raise LitPeftError(f"{where} has {len(names):,} names, and at most {MAX_NAMES:,} are read: name whole modules.")


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
        count = len(parse_object(file.read(length), path))
    if count > MAX_TENSORS:
        raise LitPeftError(f"{path} has {count:,} tensors, and at most {MAX_TENSORS:,} are read.")


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
