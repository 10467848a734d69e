"""Make a small speech corpus and a tiny random Whisper, for configs/speech.yaml and the tests: nothing is downloaded.

    python tools/speech_example.py FOLDER [--rows 240]

Each word is spoken as a tone of its own, with noise, at 8 kHz; a recording has one to three words. Writes
FOLDER/whisper, a random model with its feature extractor and a tokenizer of bytes, FOLDER/*.wav, and
FOLDER/train.jsonl, whose rows have `audio` and `text`.
"""

from __future__ import annotations

import argparse
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

WORDS = {"yes": 300, "no": 450, "left": 600, "right": 800, "up": 1050, "down": 1350, "stop": 1700, "go": 2100}
RATE, WORD_SECONDS, PAUSE_SECONDS = 8_000, 0.35, 0.1
_SPECIALS = ("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")


def speak(text: str, seed: int = 0) -> Any:
    """Return the tones of a text as samples from -1 to 1, shape (samples,)."""
    draw = np.random.default_rng(seed)
    times = np.arange(int(WORD_SECONDS * RATE)) / RATE
    pause = np.zeros(int(PAUSE_SECONDS * RATE))
    parts = [pause]
    for word in text.split():
        pitch = WORDS[word] * draw.uniform(0.97, 1.03)
        tone = 0.5 * np.sin(2 * np.pi * pitch * times) + 0.2 * np.sin(4 * np.pi * pitch * times)
        parts += [tone * np.hanning(len(times)), pause]
    samples = np.concatenate(parts)
    return samples + draw.normal(0, 0.005, len(samples))


def write_wav(path: Path, samples: Any, rate: int = RATE) -> None:
    """Write samples from -1 to 1, shape (samples,) or (samples, channels), as 16-bit wav."""
    samples = np.atleast_2d(samples.T).T
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def save_recordings(folder: Path, rows: int, seed: int = 0) -> Path:
    """Write recordings and their table; return the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        text = " ".join(draw.choice(list(WORDS), draw.integers(1, 4)))
        write_wav(folder / f"{row:04}.wav", speak(text, row))
        lines.append(json.dumps({"audio": f"{row:04}.wav", "text": text}))
    table = folder / "train.jsonl"
    table.write_text("\n".join(lines) + "\n")
    return table


def tokenizer() -> Any:
    """Return a multilingual Whisper tokenizer whose tokens are bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    specials = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), *_SPECIALS]
    names = [*sorted(ByteLevel.alphabet()), *specials]
    found = WhisperTokenizer({name: index for index, name in enumerate(names)}, [], pad_token="<|endoftext|>")
    found.add_special_tokens({"additional_special_tokens": specials[1:]})
    return found


def save_whisper(folder: Path, width: int = 64, seconds: int = 2, seed: int = 0) -> Path:
    """Write a random Whisper of two layers, with its feature extractor, tokenizer and settings of generation."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    words = tokenizer()
    ids = words.get_vocab()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    sizes: dict[str, Any] = {
        f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _sizes(width).items()
    }
    marks: dict[str, Any] = {
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": start,
    }
    config = WhisperConfig(
        vocab_size=len(words), d_model=width, max_source_positions=50 * seconds, max_target_positions=64,
        num_mel_bins=80, init_std=0.05, begin_suppress_tokens=None, **sizes, **marks,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **marks, max_length=64, is_multilingual=True, no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={name: index for name, index in ids.items() if start < index < ids["<|translate|>"]},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
    )  # fmt: skip
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=seconds).save_pretrained(folder)
    return folder


def _sizes(width: int) -> dict[str, int]:
    return {"layers": 2, "attention_heads": 4, "ffn_dim": 2 * width}


def main() -> None:
    """Write the example."""
    parser = argparse.ArgumentParser(description="Make a small speech corpus and a tiny random Whisper.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=240)
    options = parser.parse_args()
    print(f"written: {save_recordings(options.folder, options.rows)}, {save_whisper(options.folder / 'whisper')}")


if __name__ == "__main__":
    main()
