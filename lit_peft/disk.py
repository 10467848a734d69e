"""Folders on disk: walking one, and making sure it is really there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def files_below(root: Path) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order, leaving out compiled Python."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            yield Path(folder) / name


def sync_folder(folder: Path) -> None:
    """Force every file below a folder, and the folder itself, to the disk."""
    for path in (*files_below(folder), folder):
        # Folders cannot be opened for fsync on every system.
        with contextlib.suppress(PermissionError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
