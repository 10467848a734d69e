"""The memory that processes use."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Linux's `MADV_PAGEOUT`, which Python's `mmap` has no name for.
_PAGEOUT = 21


def process_memory(field: str, process: int | str = "self") -> int | None:
    """Return a field of Linux's `/proc/PROCESS/status` in bytes; None on other systems or if the process has ended.

    Args:
        field: `VmRSS`, the memory in use now; `VmHWM`, its maximum so far; `RssAnon`, the part of it that does not
            belong to files; `VmSize`, the address space.
        process: the process's number, or `self`.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_memory() -> int | None:
    """Return the largest amount of memory that this process has used so far, in bytes; None if it is unknown."""
    # On Linux, `getrusage` would also count the peak of the parent process.
    if (found := process_memory("VmHWM")) is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def page_out(tensor: Tensor) -> None:
    """Free the memory of a tensor that is mapped from a file, until it is read again. Its values do not change.

    Does nothing on systems other than Linux.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.is_contiguous():
        page = mmap.PAGESIZE
        # Only pages that belong to this tensor alone.
        start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
        if end > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
