"""Lightning callbacks, each usable with any LightningModule; names are imported lazily."""

from __future__ import annotations

from lit_peft.lazy import lazy_names

_NAMES = {
    "ActivationCache": "lit_peft.callbacks.activation_cache",
    "AdapterCheckpoint": "lit_peft.callbacks.adapter_checkpoint",
    "GracefulStop": "lit_peft.callbacks.graceful_stop",
    "PredictionWriter": "lit_peft.callbacks.prediction_writer",
    "RunBanner": "lit_peft.callbacks.run_banner",
    "TokenProgressBar": "lit_peft.callbacks.token_progress_bar",
}
__all__ = list(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)
