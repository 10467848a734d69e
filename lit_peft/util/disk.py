"""Files and folders on disk: listing them, and writing them so that they are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_peft.util.locks import is_running, process_mark

# Temporary files of other machines that have this age were left by a killed process; a running one needs less time.
_STALE_SECONDS = 3600


def files_below(root: Path) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order, except compiled Python."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            yield Path(folder) / name


def sync_folder(folder: Path) -> None:
    """Flush every file below a folder, and the folder itself, to the disk."""
    for path in (*files_below(folder), folder):
        sync(path)


def sync(path: Path) -> None:
    """Flush one file, or a folder's list of names, to the disk."""
    # Folders cannot be opened for fsync on every system.
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def clear_left(target: Path, seconds: float = _STALE_SECONDS) -> None:
    """Remove the temporary files and folders `.NAME.tmp-…` next to `target` that a killed process left.

    Their names say which process made them. Those of running processes stay.

    Args:
        target: the file or folder that they were written for.
        seconds: the minimum age of those of which it cannot be told, e.g. because they were made on another machine; 0
            if no other process can be writing.
    """
    _remove_left(target.parent.glob(f".{glob.escape(target.name)}.tmp-*"), seconds)


def clear_dead(folders: Iterable[Path]) -> None:
    """Remove what killed processes left in folders and in the folders directly inside, without their locks."""
    for folder in folders:
        for pattern in (".*.tmp-*", "*/.*.tmp-*"):
            _remove_left(folder.glob(pattern), _STALE_SECONDS)


def clear_folder(folder: Path) -> None:
    """Remove or put back what killed processes left in a folder and below it.

    No other process may write to the folder: hold its lock.
    """
    for old in folder.rglob(".*.old"):
        # The process was killed after it moved the old folder away, before or after it put the new one in place.
        target = old.with_name(old.name[1:].removesuffix(".old"))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    _remove_left(folder.rglob(".*.tmp-*"), 0)


def _remove_left(found: Iterable[Path], seconds: float) -> None:
    for left in list(found):
        running = is_running(left.name.rpartition(".tmp-")[2])
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            if running or (running is None and time.time() - left.lstat().st_mtime < seconds):
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def temporary_folder(target: Path) -> Path:
    """Create an empty folder `.NAME.tmp-…` next to `target`, to be renamed to it later."""
    clear_left(target)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-{process_mark()}-", dir=target.parent))


def put_in_place(temporary: Path, target: Path) -> None:
    """Flush a temporary folder to the disk and rename it to `target`.

    Raises:
        OSError: `target` is a folder with files in it.
    """
    open_to_others(temporary)
    sync_folder(temporary)
    temporary.rename(target)
    sync(target.parent)


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename a temporary folder to `target`. An existing folder is removed only after the new one is on the disk."""
    old = target.with_name(f".{target.name}.old")
    try:
        if target.exists():
            # A replacement that was killed at its end may have left it.
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
    """Write bytes to a file so that readers see either the old or the new content, never a part of it.

    Raises:
        OSError: the file could not be written; the old one is unchanged.
    """
    with whole_file(target) as temporary, temporary.open("xb") as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a path `.NAME.tmp-…` next to `target`, which is renamed to it at the end, or removed if the block fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_left(target)
    temporary = target.with_name(f".{target.name}.tmp-{process_mark()}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(target.parent)


def write_failure(what: str, target: Path, error: OSError) -> str:
    """Return the message that something could not be written, with the reason."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return f"{what} could not be written to {target} ({reason}); files that were there before are unchanged."


def open_to_others(folder: Path) -> None:
    """Give a temporary folder and the files below it the permissions of newly created ones (those of the umask)."""
    # `mkdtemp` and safetensors give access to the owner only. A new folder shows the umask.
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
    """Give a folder `.NAME.tmp-…` next to `target`, which is renamed to it at the end, or removed on failure."""
    temporary = temporary_folder(target)
    try:
        yield temporary
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
