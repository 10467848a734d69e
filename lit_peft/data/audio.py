"""Audio from files, bytes and numbers: reading, mixing to one channel, and resampling."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import os
import wave
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_peft.data.remote import is_url
from lit_peft.models.sources import PACKAGE_PREFIX, resolve_packaged_file
from lit_peft.util.errors import first_line
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

# Files that are one recording each.
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
# Of the resampling filter: zero crossings on each side, the share of the band that passes, and the window's shape.
_CROSSINGS, _PASSED, _BETA = 32, 0.95, 12.0
# Samples of the output that are computed at a time.
_BLOCK = 2**13
# Rates beyond these are an error in a header.
_RATES = (1_000, 200_000)


class AudioError(Exception):
    """A recording cannot be read; the text says why, and what to do."""


def local_audio(table: Dataset, column: str, source: str) -> Dataset:
    """Return a table whose recordings are read here: paths as they are found, and bytes, which `datasets` keeps.

    Args:
        table: the table.
        column: the column of the recordings; nothing happens if there is none.
        source: the file that the table was read from. Relative paths start at its folder, if they exist there.
    """
    import datasets

    feature = table.features.get(column)
    if isinstance(feature, datasets.Audio):
        return table.cast_column(column, datasets.Audio(decode=False))
    file = resolve_packaged_file(source, "data") if source.startswith(PACKAGE_PREFIX) else Path(source).expanduser()
    if feature is None or getattr(feature, "dtype", "") != "string" or not file.is_file():
        return table
    paths = list(table[column])
    found = [path if path is None else _beside(file.parent, path) for path in paths]
    return table if found == paths else table.remove_columns(column).add_column(column, found)


def _beside(folder: Path, path: str) -> str:
    beside = folder / path
    # Of a text that is too long for a name, `Path.is_file` raises an error.
    return str(beside) if not Path(path).is_absolute() and os.path.isfile(beside) else path


def audio_key(table: Dataset, column: str) -> Callable[[int], Hashable]:
    """Return a function that maps a row index to its recording's path, or to a hash of its bytes or numbers."""
    keys: list[Hashable] = []
    for block in table.select_columns(column).iter(100):
        keys += [_key(cell) for cell in block[column]]
    return keys.__getitem__


def _key(cell: Any) -> Hashable:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    if isinstance(cell, dict) and cell.get("array") is not None:
        return hashlib.sha256(repr(cell["array"]).encode()).hexdigest()
    return audio_path(cell) or repr(cell)


def audio_path(cell: Any) -> str | None:
    """Return the path of a recording; None if it is bytes or numbers without one."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else None


def file_states(table: Dataset, column: str) -> str:
    """Return a hash of the sizes and times of the files among a table's recordings, for cache keys."""
    digest = hashlib.sha256()
    for path in (audio_path(cell) for block in table.select_columns(column).iter(100) for cell in block[column]):
        if path is not None and os.path.isfile(path):
            status = os.stat(path)
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def audio_length(cell: Any) -> tuple[float, int]:
    """Return the seconds of a recording and its sampling rate, from its header if it is a file.

    Raises:
        AudioError: it cannot be read.
    """
    if isinstance(cell, dict) and cell.get("array") is not None:
        samples, rate = _numbers(cell)
        return len(samples) / rate, rate
    seconds, rate = _open(cell, _header_of_wave, _header_by_soundfile)
    return seconds, rate


def read_audio(cell: Any, rate: int, seconds: float | None = None) -> NDArray[np.float32]:
    """Return a recording as one channel from -1 to 1, shape (samples,).

    Args:
        cell: a path; bytes of a file; or a dictionary with `path`, `bytes`, or `array` and `sampling_rate`. Channels
            are averaged.
        rate: the sampling rate of the result.
        seconds: read at most so many seconds; None: all.

    Raises:
        AudioError: it cannot be read, has no samples, or has values that are not finite.
    """
    if isinstance(cell, dict) and cell.get("array") is not None:
        samples, own_rate = _numbers(cell)
    else:
        samples, own_rate = _open(cell, _samples_of_wave, _samples_by_soundfile)
    if seconds is not None:
        samples = samples[: math.ceil(seconds * own_rate)]
    if samples.ndim > 1:
        samples = samples.mean(axis=1)
    if not len(samples):
        raise AudioError("has no samples; remove the row")
    if not np.isfinite(samples).all():
        raise AudioError("has samples that are not finite numbers; correct or remove the row")
    return resample(samples.astype(np.float32, copy=False), own_rate, rate)


def _numbers(cell: dict[str, Any]) -> tuple[NDArray[Any], int]:
    rate = cell.get("sampling_rate")
    if not isinstance(rate, int) or isinstance(rate, bool):
        raise AudioError(f"has an array with sampling_rate {brief(rate)}; give the samples per second as an integer")
    try:
        samples = np.asarray(cell["array"], dtype=np.float32)
    except (TypeError, ValueError):
        raise AudioError(f"has {brief(cell['array'])}, which are no samples; give a list of numbers") from None
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T  # channels first, as torch has them
    if samples.ndim not in (1, 2):
        raise AudioError(f"has an array of {samples.ndim} dimensions; give a list of samples, or one for each channel")
    return samples, _checked(rate)


def _open(cell: Any, by_wave: Callable[[Any], Any], by_soundfile: Callable[[Any], Any]) -> Any:
    """Read a file with the standard library if it is plain wav, else with soundfile."""
    path = audio_path(cell)
    content = cell if isinstance(cell, bytes) else cell.get("bytes") if isinstance(cell, dict) else None
    if content is None and path is None:
        raise AudioError(
            f"has {brief(cell)}, which is no audio; give a path, the bytes of a file, or a dictionary with `array` and "
            "`sampling_rate`"
        )
    if content is None and path is not None:
        if is_url(path):
            raise AudioError(f"has the URL {path!r}; download the files first and give their paths")
        if not os.path.isfile(path):
            raise AudioError(
                f"has the file {brief(path, 300)}, which does not exist; paths start at the folder of the table, or "
                "at the current one"
            )
    name = repr(path) if path is not None else "a file given as bytes"

    def source() -> Any:
        return path if content is None else io.BytesIO(content)

    try:
        return by_wave(source())
    except (wave.Error, EOFError):
        pass  # another format
    except OSError as problem:
        raise AudioError(f"has {name}, which cannot be read ({first_line(problem)})") from problem
    if importlib.util.find_spec("soundfile") is None:
        raise AudioError(
            f"has {name}, which is not a plain wav file; other formats need soundfile: pip install 'lit-peft[speech]'"
        )
    import soundfile

    try:
        return by_soundfile(source())
    except (soundfile.LibsndfileError, OSError) as problem:
        raise AudioError(f"has {name}, which soundfile cannot read ({first_line(problem)})") from problem


def _header_of_wave(source: Any) -> tuple[float, int]:
    size = len(source.getbuffer()) if isinstance(source, io.BytesIO) else os.path.getsize(source)
    with wave.open(source, "rb") as file:
        # A file that was not closed says that it has more frames than there are.
        frames = min(file.getnframes(), size // (file.getsampwidth() * file.getnchannels()))
        return frames / _checked(file.getframerate()), file.getframerate()


def _samples_of_wave(source: Any) -> tuple[NDArray[Any], int]:
    with wave.open(source, "rb") as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), _checked(file.getframerate())
        content = file.readframes(file.getnframes())
    content = content[: len(content) - len(content) % (width * channels)]
    if width == 1:  # unsigned
        samples = np.frombuffer(content, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        padded = np.zeros((len(content) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        samples = padded.view("<i4")[:, 0].astype(np.float64) / 2**31
    else:
        samples = np.frombuffer(content, f"<i{width}").astype(np.float64) / 2 ** (8 * width - 1)
    return samples.reshape(-1, channels), rate


def _header_by_soundfile(source: Any) -> tuple[float, int]:
    import soundfile

    found = soundfile.info(source)
    return found.frames / _checked(found.samplerate), int(found.samplerate)


def _samples_by_soundfile(source: Any) -> tuple[NDArray[Any], int]:
    import soundfile

    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return samples, _checked(rate)


def _checked(rate: int) -> int:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise AudioError(f"has a sampling rate of {rate}; it must be from {_RATES[0]} to {_RATES[1]}")
    return int(rate)


def resample(samples: NDArray[np.float32], rate: int, new_rate: int) -> NDArray[np.float32]:
    """Return samples at another rate: band-limited interpolation with a windowed sinc (Smith and Gossett 1984).

    Args:
        samples: shape (n,).
        rate: samples per second.
        new_rate: samples per second of the result.

    Returns:
        Shape (ceil(n * new_rate / rate),). Before the first sample and after the last there is silence.
    """
    if rate == new_rate:
        return samples
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    table = _filters(up, down)
    taps = table.shape[1]
    padded = np.pad(samples, (taps // 2 - 1, taps // 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)
    out = np.empty(-(-len(samples) * up // down), np.float32)
    for start in range(0, len(out), _BLOCK):
        places = np.arange(start, min(start + _BLOCK, len(out)), dtype=np.int64) * down
        out[start : start + len(places)] = np.einsum("nt,nt->n", windows[places // up], table[places % up])
    return out


@lru_cache(maxsize=8)
def _filters(up: int, down: int) -> NDArray[np.float32]:
    """Return the weights of neighboring samples for each place between two of them, shape (up, taps).

    A place p / up after the sample i has the neighbors i - taps / 2 + 1 to i + taps / 2.
    """
    cutoff = min(1.0, up / down) * _PASSED
    half = math.ceil(_CROSSINGS / cutoff)
    distances = np.arange(up)[:, None] / up - np.arange(1 - half, half + 1)[None]
    window = np.i0(_BETA * np.sqrt(np.clip(1 - (distances / half) ** 2, 0, None))) / np.i0(_BETA)
    weights = np.sinc(cutoff * distances) * window
    # A constant stays the same constant.
    normed: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normed
