"""Silence what libraries say about themselves when they are imported."""

from __future__ import annotations

import logging
import warnings

# The parts of theirs that do not fit this machine, and deprecations among themselves; their errors are shown.
_LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")
_WARNINGS = (".*LeafSpec.*is deprecated.*",)


def quiet_libraries() -> None:
    """Show only the errors of libraries whose messages no user of a command can act on. Call it before they load."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
