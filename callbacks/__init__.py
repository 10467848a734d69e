"""Lightning callbacks, each usable with any LightningModule; names are imported lazily."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "PredictionWriter": "lit_peft.callbacks.prediction_writer",
    "RunBanner": "lit_peft.callbacks.run_banner",
    "TokenProgressBar": "lit_peft.callbacks.token_progress_bar",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'lit_peft.callbacks' has no attribute {name!r}")
