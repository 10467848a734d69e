"""The header of a GGUF file, checked before the file is converted.

Readers of GGUF believe the counts and lengths in a header, which a few bytes can make enormous.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

MAX_FIELDS, MAX_TENSORS, MAX_STRING = 10_000, 50_000, 2**24
# The vocabulary's tokens, scores and types, and the tokenizer's merges.
MAX_VALUES = 5_000_000
MAX_DIMS = 4
# How `struct` calls the types of values, by their number; 8 is a string and 9 a list.
_TYPES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
# Sizes that models are built with, which no model has without a tensor of that size.
_SIZES = ("embedding_length", "feed_forward_length", "vocab_size", "expert_count", "head_count", "head_count_kv")
# Sizes that every model's file has.
_NEEDED = ("block_count", "embedding_length")


def check_gguf_header(file: Path) -> None:
    """Check that a GGUF file's header is complete, and that nothing in it is larger than the file can hold.

    Args:
        file: the file, which starts with `GGUF`.

    Raises:
        LitPeftError: it is not; the message says what is wrong.
    """
    with open(file, "rb") as stream:
        header = _Header(stream, os.fstat(stream.fileno()).st_size)
        try:
            header.read()
        except (struct.error, UnicodeDecodeError):
            header.problem = "its header is incomplete"
        if header.problem:
            raise LitPeftError(f"base {str(file)!r} is not a readable GGUF file: {header.problem}; download it again.")


class _Header:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size
        self.order, self.values, self.problem = "<", 0, ""

    def read(self) -> None:
        self.stream.seek(4)
        (version,) = struct.unpack("<I", self.stream.read(4))
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"
            (version,) = struct.unpack(">I", struct.pack("<I", version))
        if version not in (2, 3):
            self.problem = f"it is of version {version}, and only 2 and 3 are read"
            return
        tensors, fields = self.number("Q"), self.number("Q")
        if tensors > MAX_TENSORS or fields > MAX_FIELDS:
            self.problem = f"it declares {tensors:,} tensors and {fields:,} fields"
            return
        sizes: dict[str, Any] = {}
        for _ in range(fields):
            name = self.string()
            value = None if self.problem else self.value(self.number("I"))
            if self.problem:
                return
            if isinstance(value, int) and name.count(".") == 1:
                sizes[name.partition(".")[2]] = value
        missing = [name for name in _NEEDED if name not in sizes]
        if missing or not tensors:
            # transformers would build a model of its default sizes, which may have billions of parameters.
            self.problem = f"it has no {missing[0]}" if missing else "it has no tensors"
            return
        largest = 0
        for _ in range(tensors):
            largest = max(largest, self.tensor())
            if self.problem:
                return
        if sizes.get("block_count", 0) > tensors:
            self.problem = f"it has {tensors} tensors for {brief(sizes['block_count'])} layers"
        for name in _SIZES:
            if sizes.get(name, 0) > largest:
                self.problem = f"it has {name}={brief(sizes[name])}, and no tensor of that size"

    def number(self, kind: str) -> Any:
        (found,) = struct.unpack(f"{self.order}{kind}", self.stream.read(struct.calcsize(f"{self.order}{kind}")))
        return found

    def string(self) -> str:
        length = self.number("Q")
        if length > min(MAX_STRING, self.size - self.stream.tell()):
            self.problem = f"it has a text of {length:,} bytes"
            return ""
        return self.stream.read(length).decode("utf-8", errors="replace")

    def value(self, kind: int, inside: bool = False) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _TYPES:
            return self.number(_TYPES[kind])
        if kind != _LIST or inside:
            self.problem = f"it has a value of the unknown type {kind}"
            return None
        part, count = self.number("I"), self.number("Q")
        self.values += count
        if self.values > MAX_VALUES or count > self.size:
            self.problem = f"it has a list of {count:,} values"
        elif part in _TYPES:
            self.stream.seek(min(count * struct.calcsize(f"={_TYPES[part]}"), self.size), os.SEEK_CUR)
        else:
            for _ in range(count):
                self.value(part, inside=True)
                if self.problem:
                    break
        return None

    def tensor(self) -> int:
        """Read the description of a tensor; return its largest size."""
        name = self.string()
        if self.problem:
            return 0
        dims = self.number("I")
        if dims > MAX_DIMS:
            self.problem = f"its tensor {brief(name)} has {dims:,} dimensions"
            return 0
        shape = [self.number("Q") for _ in range(dims)]
        self.number("I"), self.number("Q")
        # The smallest type has less than 2 bits for each number.
        if math.prod(shape) > 8 * self.size:
            self.problem = f"its tensor {brief(name)} has the shape {shape}, which is more than the file"
        return max(shape, default=0)
