"""Reading audio: formats, channels, rates, and what cannot be read."""

from __future__ import annotations

import io
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.signal import resample_poly
from speech_example import write_wav

from lit_peft.data.audio import AudioError, audio_length, read_audio, resample

TONE = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)


def tone(rate: int, pitch: float = 440.0) -> Any:
    return np.sin(2 * np.pi * pitch * np.arange(rate) / rate).astype(np.float32)


def pcm(samples: Any, width: int, channels: int = 1, rate: int = 8000) -> bytes:
    """A wav file of integers of `width` bytes."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            content = np.round(samples * 127 + 128).astype(np.uint8).tobytes()
        else:
            whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i8")
            content = whole.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
        file.writeframes(content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("rate", "new"), [(44100, 16000), (8000, 16000), (22050, 16000), (48000, 16000), (11025, 16000)]
)
def test_a_resampled_tone_is_the_tone_at_the_new_rate(rate: int, new: int) -> None:
    found = resample(tone(rate), rate, new)
    assert found.dtype == np.float32 and len(found) == new
    assert np.abs(found - tone(new))[200:-200].max() < 1e-5


def test_a_tone_above_half_of_the_new_rate_is_not_heard() -> None:
    assert np.abs(resample(tone(48000, 9000), 48000, 16000))[200:-200].max() < 1e-5


def test_resampling_is_close_to_scipys() -> None:
    noise = np.random.default_rng(0).normal(size=4000)
    smooth = resample_poly(noise, 8, 1).astype(np.float32)  # only low frequencies, where both filters are flat
    for up, down in ((2, 1), (1, 2), (3, 4)):
        found = resample(smooth, 8000 * down, 8000 * up)
        theirs = resample_poly(smooth, up, down, window=("kaiser", 12.0))
        assert np.abs(found - theirs)[300:-300].max() < 0.01 * np.abs(smooth).max()


@pytest.mark.parametrize(("width", "error"), [(1, 2e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_plain_wav_of_every_width_is_read(width: int, error: float) -> None:
    content = pcm(TONE, width)
    assert audio_length(content) == (1.0, 8000)
    assert np.abs(read_audio(content, 8000) - TONE).max() < error


def test_a_path_bytes_and_an_array_are_the_same_recording(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", TONE)
    content = (tmp_path / "a.wav").read_bytes()
    path = str(tmp_path / "a.wav")
    first = read_audio(path, 16000)
    for cell in (content, {"bytes": content, "path": "elsewhere.wav"}, {"path": path, "bytes": None}):
        assert (read_audio(cell, 16000) == first).all() and audio_length(cell) == (1.0, 8000)
    numbers = {"array": (np.frombuffer(content[44:], "<i2") / 2**15).tolist(), "sampling_rate": 8000}
    assert (read_audio(numbers, 16000) == first).all()


def test_channels_are_averaged(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.stack([TONE, np.zeros_like(TONE)], axis=1))
    assert np.abs(read_audio(str(tmp_path / "a.wav"), 8000) - TONE / 2).max() < 1e-4
    both = {"array": np.stack([TONE, -TONE]).tolist(), "sampling_rate": 8000}
    assert np.abs(read_audio(both, 8000)).max() == 0


def test_reading_stops_after_so_many_seconds() -> None:
    assert len(read_audio(pcm(TONE, 2), 16000, seconds=0.25)) == 4000


def test_flac_and_float_wav_are_read_by_soundfile(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", TONE, 8000)
    soundfile.write(tmp_path / "a.wav", TONE, 8000, subtype="FLOAT")
    for name in ("a.flac", "a.wav"):
        assert audio_length(str(tmp_path / name)) == (1.0, 8000)
        assert np.abs(read_audio((tmp_path / name).read_bytes(), 8000) - TONE).max() < 1e-4


def test_without_soundfile_other_formats_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AudioError, match=r"lit-peft\[speech\]"):
        audio_length(b"fLaC\0\0\0\x22")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("missing.wav", "does not exist"),
        ("https://example.org/a.wav", "download"),
        (17, "no audio"),
        ([0.1, 0.2], "no audio"),
        ({"array": [0.1], "sampling_rate": None}, "sampling_rate"),
        ({"array": [0.1], "sampling_rate": 7}, "sampling rate of 7"),
        ({"array": ["a"], "sampling_rate": 8000}, "list of numbers"),
        ({"array": [float("nan")], "sampling_rate": 8000}, "finite"),
        ({"array": [], "sampling_rate": 8000}, "no samples"),
        (b"RIFF\x04\0\0\0WAVE", "soundfile"),
    ],
)
def test_what_cannot_be_read_says_why(cell: Any, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        read_audio(cell, 8000)


def test_a_header_that_promises_more_samples_than_there_are_is_not_believed() -> None:
    content = pcm(TONE, 2)
    with_lie = content[:40] + (2**31 - 2).to_bytes(4, "little") + content[44:]
    seconds, _ = audio_length(with_lie)
    assert seconds < 1.01
    assert len(read_audio(with_lie, 8000)) == 8000
