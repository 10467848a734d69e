"""Locks of folders, and marks of processes, which tell what a killed process left from what is in use."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import threading
import uuid
import warnings
from functools import cache
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
# What a file system answers that has no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}


class FolderInUseError(Exception):
    """Another process holds the lock of a folder.

    Attributes:
        owner: that process, in words, e.g. `process 4711 on host node3`.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


# ------------------------------------------------------------------------------------------------- processes


@cache
def _machine() -> str:
    """A name of the machine, of its present run and of the space of its process numbers (one for each container)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _started(process: int) -> int:
    """When a process of this machine was started, in ticks since the machine was; 0 if that is not known."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        stat = Path(f"/proc/{process}/stat").read_bytes()
        return int(stat[stat.rindex(b")") :].split()[20])
    return 0


def process_mark() -> str:
    """Return what tells this process from every other one, as a part of a file's name."""
    return f"{_machine()}-{os.getpid()}-{_started(os.getpid())}"


def is_running(mark: str) -> bool | None:
    """Return whether a process is running; None if that cannot be told on this machine.

    Args:
        mark: its `process_mark`, or text that begins with it.
    """
    found = re.match(r"([0-9a-f]{8})-(\d+)-(\d+)(?!\d)", mark)
    if found is None or found[1] != _machine() or os.name != "posix":
        return None
    process, started = int(found[2]), int(found[3])
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    # The number may have been given to a new process since.
    return not started or _started(process) == started


# ----------------------------------------------------------------------------------------------------- locks

_held: dict[str, FolderLock] = {}
_guard = threading.Lock()


class FolderLock:
    """A lock on a folder for one process at a time. It ends with the process, however that ends.

    The file `.lock` in the folder says who holds it. Within a process the lock can be taken several times; it is given
    back with the last `release`. Where the file system has no locks, the file alone is the lock: then one that a dead
    process of the same machine left is taken over, and one from another machine must be removed by hand.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder.resolve() / NAME
        self._handle: int | None = None
        self._count = 0
        self._process = 0

    def release(self) -> None:
        """Give the lock back."""
        with _guard:
            # A forked process has a copy of this object, but not the lock.
            if self._process != os.getpid() or not self._count:
                return
            self._count -= 1
            if self._count:
                return
            del _held[str(self.file)]
            # The name goes first: who opens the file now is told so by its inode.
            with contextlib.suppress(OSError):
                self.file.unlink()
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _take(self) -> None:
        if fcntl is None:
            self._take_by_file()
            return
        while True:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The former owner may have removed the file between the two calls.
                current = self.file.stat().st_ino == os.fstat(handle).st_ino
            except FileNotFoundError:
                current = False
            except OSError as error:
                os.close(handle)
                if error.errno in _NO_LOCKS:
                    warnings.warn(
                        f"The file system of {self.file.parent} has no locks, so the file {self.file.name} in it "
                        "stands for one: if a process on another machine is killed, remove the file by hand.",
                        stacklevel=4,
                    )
                    self._take_by_file()
                    return
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise FolderInUseError(self._owner()) from None
                raise
            if current:
                break
            os.close(handle)
        self._handle = handle
        with contextlib.suppress(OSError):  # on a full disk, the lock holds, but does not say for whom
            os.ftruncate(handle, 0)
            os.write(handle, _myself())

    def _take_by_file(self) -> None:
        # The file appears with its content: it is linked, which fails if there is one.
        new = self.file.with_name(f"{NAME}.{process_mark()}-{uuid.uuid4().hex[:8]}")
        new.write_bytes(_myself())
        try:
            while True:
                try:
                    os.link(new, self.file)
                    return
                except FileExistsError:
                    known = self._read()
                if is_running(str(known.get("mark", ""))) is not False and (known or self.file.exists()):
                    raise FolderInUseError(self._owner())
                # Of several that find it stale, one succeeds in moving it away.
                stale = new.with_name(new.name + ".stale")
                with contextlib.suppress(FileNotFoundError):
                    self.file.rename(stale)
                    stale.unlink()
        finally:
            new.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.file.read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _owner(self) -> str:
        known = self._read()
        if not known:
            return "another process"
        return f"process {known.get('process')} on host {known.get('host')}"


def lock_folder(folder: Path) -> FolderLock:
    """Lock a folder, which is created if need be; call `release` on the result.

    Raises:
        FolderInUseError: another process holds the lock.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    with _guard:
        lock = _held.get(str(lock.file), lock)
        if not lock._count:
            lock._take()
            lock._process = os.getpid()
            _held[str(lock.file)] = lock
        lock._count += 1
    return lock


def _myself() -> bytes:
    owner = {"process": os.getpid(), "host": socket.gethostname(), "mark": process_mark()}
    return json.dumps(owner).encode()


def _forget_in_child() -> None:
    # A forked process, e.g. a worker of a data loader, would keep the lock beyond the death of its owner.
    global _guard
    _guard = threading.Lock()
    for lock in _held.values():
        lock._close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
