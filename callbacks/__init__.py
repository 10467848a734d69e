"""Lightning callbacks, each usable with any LightningModule; imported when they are first used."""

from __future__ import annotations

from lit_peft.util.lazy import lazy_names

_NAMES = {
    "ActivationCache": "lit_peft.callbacks.activation_cache",
    "AdapterCheckpoint": "lit_peft.callbacks.adapter_checkpoint",
    "AdapterEMA": "lit_peft.callbacks.adapter_ema",
    "AdapterNorms": "lit_peft.callbacks.adapter_norms",
    "ExactResume": "lit_peft.callbacks.exact_resume",
    "FrozenWeightsGuard": "lit_peft.callbacks.frozen_weights_guard",
    "GracefulStop": "lit_peft.callbacks.graceful_stop",
    "LastCheckpoint": "lit_peft.callbacks.last_checkpoint",
    "LearningCurve": "lit_peft.callbacks.learning_curve",
    "NonFiniteGuard": "lit_peft.callbacks.non_finite_guard",
    "PrecisionReport": "lit_peft.callbacks.precision_report",
    "PredictionWriter": "lit_peft.callbacks.prediction_writer",
    "RunBanner": "lit_peft.callbacks.run_banner",
    "SampleGenerations": "lit_peft.callbacks.sample_generations",
    "Throughput": "lit_peft.callbacks.throughput",
    "TokenProgressBar": "lit_peft.callbacks.token_progress_bar",
}
__all__ = list(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)
