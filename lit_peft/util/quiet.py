"""Silence what libraries say about themselves when they are imported."""

from __future__ import annotations

import logging
import sys
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


def quiet_run() -> None:
    """Silence what libraries say of a run that this program says or decides itself, but not their other warnings."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
