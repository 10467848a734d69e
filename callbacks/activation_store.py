"""Store hidden states in memory or on disk: a row's key maps to its states [tokens, d]."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor


class MemoryStore:
    """Rows in memory.

    Args:
        limit: maximal size in bytes; further rows are not stored.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._rows: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __getitem__(self, key: bytes) -> Tensor:
        return self._rows[key]

    def put(self, key: bytes, states: Tensor) -> None:
        """Store a row if there is room."""
        if self._has_room(states):
            self._rows[key] = states.clone()

    def refresh(self) -> None:
        """Find rows that other processes stored: there are none in memory."""

    def _has_room(self, states: Tensor) -> bool:
        if self.size + states.nbytes > self.limit:
            if self.size <= self.limit:
                warnings.warn(
                    f"ActivationCache is full ({self.limit / 1e9:g} GB): all further rows are computed in every epoch.",
                    stacklevel=4,
                )
                self.size = self.limit + 1
            return False
        self.size += states.nbytes
        return True


class DiskStore(MemoryStore):
    """Rows in a folder: each process appends to its own pair of files and reads those of all processes.

    `rows-RANK.bin` contains the states one after another. When the states of a row are complete, a line is added to
    `rows-RANK.index`: key, offset, tokens, d, type. An incomplete line is ignored.

    Args:
        limit: maximal size in bytes that this process writes.
        folder: the folder.
        rank: number of the process.
    """

    def __init__(self, limit: int, folder: Path, rank: int) -> None:
        super().__init__(limit)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._places: dict[bytes, tuple[Path, int, int, int, torch.dtype]] = {}
        self._own = folder / f"rows-{rank}.bin"
        self._bin, self._index = (path.open("ab") for path in (self._own, self._own.with_suffix(".index")))
        if self._index.tell():
            self._index.write(b"\n")  # ends an incomplete line
        self.size = self._bin.tell()
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getitem__(self, key: bytes) -> Tensor:
        path, offset, tokens, width, dtype = self._places[key]
        with path.open("rb") as file:
            file.seek(offset)
            content = bytearray(file.read(tokens * width * dtype.itemsize))
        return torch.frombuffer(content, dtype=dtype).view(tokens, width)

    def put(self, key: bytes, states: Tensor) -> None:
        """Write a row if there is room."""
        if not self._has_room(states):
            return
        offset = self._bin.tell()
        self._bin.write(states.contiguous().view(torch.uint8).numpy().tobytes())
        self._bin.flush()
        dtype = str(states.dtype).removeprefix("torch.")
        self._index.write(f"{key.hex()} {offset} {states.shape[0]} {states.shape[1]} {dtype}\n".encode())
        self._index.flush()
        self._places[key] = (self._own, offset, states.shape[0], states.shape[1], states.dtype)

    def refresh(self) -> None:
        """Read the index of every process."""
        for index in sorted(self.folder.glob("rows-*.index")):
            size = os.path.getsize(index.with_suffix(".bin"))
            for line in index.read_text().splitlines():
                fields = line.split()
                dtype = getattr(torch, fields[4], None) if len(fields) == 5 else None
                if not isinstance(dtype, torch.dtype):
                    continue
                offset, tokens, width = map(int, fields[1:4])
                if offset + tokens * width * dtype.itemsize <= size:
                    place = (index.with_suffix(".bin"), offset, tokens, width, dtype)
                    self._places[bytes.fromhex(fields[0])] = place
