"""The memory that processes hold."""

from __future__ import annotations

import sys
from pathlib import Path


def process_memory(field: str, process: int | str = "self") -> int | None:
    """A field of Linux's `/proc/PROCESS/status` in bytes; None where there is none, or the process has ended.

    Args:
        field: `VmRSS`, what is in memory now; `VmHWM`, the most of that so far; `RssAnon`, the part of it that is no
            file's; `VmSize`, the address space.
        process: its number, or `self`.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_memory() -> int | None:
    """The most that this process has held in memory so far, in bytes; None where the system does not say."""
    # Linux's `getrusage` begins with the peak of the process that started this one.
    if (found := process_memory("VmHWM")) is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
