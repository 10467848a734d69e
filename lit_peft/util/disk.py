"""Files and folders on disk: walking a folder, and making sure that what is written is really there, and whole."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a killed process left half written is removed when it is this old: a running one needs less.
_STALE_SECONDS = 3600


def files_below(root: Path) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order, leaving out compiled Python."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            yield Path(folder) / name


def sync_folder(folder: Path) -> None:
    """Force every file below a folder, and the folder itself, to the disk."""
    for path in (*files_below(folder), folder):
        sync(path)


def sync(path: Path) -> None:
    """Force one file, or a folder's list of names, to the disk."""
    # Folders cannot be opened for fsync on every system.
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def clear_left(target: Path, seconds: float = _STALE_SECONDS) -> None:
    """Remove the temporary files and folders `.NAME.tmp-…` beside `target` that a killed process left.

    Args:
        target: what they were to become.
        seconds: how old they are at the least; 0 where no other process can be writing.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # another process has put its own in place
            if time.time() - left.stat().st_mtime < seconds:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def temporary_folder(target: Path) -> Path:
    """Make an empty folder `.NAME.tmp-…` beside `target`, to become it once it is filled."""
    clear_left(target)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))


def put_in_place(temporary: Path, target: Path) -> None:
    """Sync a filled temporary folder and make it `target`.

    Raises:
        OSError: `target` is a folder with files in it.
    """
    open_to_others(temporary)
    sync_folder(temporary)
    temporary.rename(target)
    sync(target.parent)


def replace_folder(temporary: Path, target: Path) -> None:
    """Make a filled temporary folder `target`; one that is there goes only when the new one is on the disk."""
    old = target.with_name(f".{target.name}.old")
    try:
        if target.exists():
            # Of an earlier replacement that was killed at its end.
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        put_in_place(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_file(target: Path, content: Any) -> None:
    """Write bytes as a file that a reader sees whole, the old one or the new one.

    Raises:
        OSError: it could not be written; what was there still is.
    """
    with whole_file(target) as temporary, temporary.open("xb") as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A name `.NAME.tmp-…` beside `target` for a file that becomes it when the block ends, or is gone if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_left(target)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(target.parent)


def write_failure(what: str, target: Path, error: OSError) -> str:
    """Say that something could not be written, and why."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return f"{what} could not be written to {target} ({reason}); what was written before is untouched."


def open_to_others(folder: Path) -> None:
    """Give a temporary folder and the files below it the permissions that new ones get (the umask's)."""
    # What `mkdtemp` and safetensors make is for the owner alone; the umask shows in a plain new folder.
    probe = folder / ".mode"
    probe.mkdir()
    mode = probe.stat().st_mode & 0o777
    probe.rmdir()
    for path in files_below(folder):
        path.chmod(mode & 0o666)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        path.chmod(mode)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder `.NAME.tmp-…` beside `target` that becomes it when the block ends, or is gone if it fails."""
    temporary = temporary_folder(target)
    try:
        yield temporary
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
