"""The feature extractor of a speech model, which turns audio into what its encoder takes."""

from __future__ import annotations

import inspect
from typing import Any

from lit_peft.util.errors import LitPeftError

# The names of what models of audio take.
AUDIO = ("input_features", "input_values")


def audio_part(processor: Any, base: str) -> Any:
    """Return the feature extractor of a processor.

    Raises:
        LitPeftError: it has none for audio.
    """
    extractor = getattr(processor, "feature_extractor", None)
    if not hasattr(extractor, "sampling_rate"):
        raise LitPeftError(
            f"data.base {base!r} has a {type(processor).__name__} without a feature extractor for audio: choose a "
            "speech model, e.g. 'openai/whisper-tiny'."
        )
    return extractor


def longest_audio(extractor: Any) -> float | None:
    """Return the seconds of audio that a feature extractor takes at most; None if there is no limit."""
    seconds = getattr(extractor, "chunk_length", None)
    return None if seconds is None else float(seconds)


def extract_features(extractor: Any, recordings: list[Any]) -> dict[str, Any]:
    """Return the features of recordings as padded tensors, by the names that the model's `forward` gives them.

    Args:
        extractor: the feature extractor.
        recordings: arrays of samples at the extractor's rate, shape (samples,).
    """
    # Whisper's features have one length; the others are padded to the longest.
    of_one_length = inspect.signature(extractor.__call__).parameters["padding"].default == "max_length"
    padding = {} if of_one_length else {"padding": True}
    rate = extractor.sampling_rate
    features = extractor(recordings, sampling_rate=rate, return_tensors="pt", return_attention_mask=True, **padding)
    return dict(features)
