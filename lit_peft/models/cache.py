"""The folder where lit_peft keeps what it converts."""

from __future__ import annotations

import os
from pathlib import Path

from lit_peft.util.errors import LitPeftError

CACHE_VARIABLE = "LIT_PEFT_CACHE"


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return lit_peft's cache folder: `cache_dir`, else `$LIT_PEFT_CACHE`, else `~/.cache/lit_peft`."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/lit_peft"
    return Path(chosen).expanduser()


def cache_error(where: str, exc: OSError) -> LitPeftError:
    """Return the error for a cache that cannot be written; `where` names the setting that needs it."""
    return LitPeftError(
        f"{where}: {exc.strerror or exc} ({exc.filename or 'cache'}); set {CACHE_VARIABLE} to a writable folder with "
        "enough free space."
    )
