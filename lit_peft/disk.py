"""Folders on disk: walking one, and making sure it is really there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
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


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder `.NAME.tmp-…` beside `target` that becomes it when the block ends, or is gone if it fails."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        yield temporary
        # mkdtemp makes it for the owner alone.
        temporary.chmod(0o755)
        sync_folder(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
