"""Recognizing that a file could not be written, whichever library tried."""

from __future__ import annotations

import errno
import re

from lit_peft.util.errors import causes

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
}


def write_error(problem: BaseException) -> str | None:
    """Return a sentence for an error that a file could not be written; None if the error is another one.

    Args:
        problem: the error, with its causes. safetensors raises errors of its own, which give the system's number.
    """
    for cause in causes(problem):
        number = cause.errno if isinstance(cause, OSError) else None
        found = re.search(r"\(os error (\d+)\)", str(cause)) if number is None else None
        reason = _REASONS.get(int(found[1]) if found else number or 0)
        if reason is not None:
            name = getattr(cause, "filename", None)
            where = f" to {name}" if isinstance(name, str) else ""
            return (
                f"A file could not be written{where}: {reason}. Files that were complete before are unchanged; run the "
                "same command again when this is solved."
            )
    return None
