"""Lightning callbacks, each usable with any LightningModule; imported when they are first used."""

# Made by tools/make_stubs.py from the code. Do not edit.

from lit_peft.callbacks.activation_cache import ActivationCache as ActivationCache
from lit_peft.callbacks.adapter_checkpoint import AdapterCheckpoint as AdapterCheckpoint
from lit_peft.callbacks.adapter_ema import AdapterEMA as AdapterEMA
from lit_peft.callbacks.adapter_norms import AdapterNorms as AdapterNorms
from lit_peft.callbacks.exact_resume import ExactResume as ExactResume
from lit_peft.callbacks.frozen_weights_guard import FrozenWeightsGuard as FrozenWeightsGuard
from lit_peft.callbacks.graceful_stop import GracefulStop as GracefulStop
from lit_peft.callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
from lit_peft.callbacks.learning_curve import LearningCurve as LearningCurve
from lit_peft.callbacks.non_finite_guard import NonFiniteGuard as NonFiniteGuard
from lit_peft.callbacks.precision_report import PrecisionReport as PrecisionReport
from lit_peft.callbacks.prediction_writer import PredictionWriter as PredictionWriter
from lit_peft.callbacks.run_banner import RunBanner as RunBanner
from lit_peft.callbacks.sample_generations import SampleGenerations as SampleGenerations
from lit_peft.callbacks.throughput import Throughput as Throughput
from lit_peft.callbacks.token_progress_bar import TokenProgressBar as TokenProgressBar

__all__ = [
    "ActivationCache",
    "AdapterCheckpoint",
    "AdapterEMA",
    "AdapterNorms",
    "ExactResume",
    "FrozenWeightsGuard",
    "GracefulStop",
    "LastCheckpoint",
    "LearningCurve",
    "NonFiniteGuard",
    "PrecisionReport",
    "PredictionWriter",
    "RunBanner",
    "SampleGenerations",
    "Throughput",
    "TokenProgressBar",
]
