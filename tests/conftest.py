"""Tiny models and data, made on the spot: no test needs a download."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

# Before torch is imported: the workers share the cores, and processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_warn_always(True)  # what torch says once in a process it says in each test

WORDS = "a bad film good great is it of poor the this was well weak wonderful awful story acting".split()  # noqa: SIM905

TESTS = str(Path(__file__).parent)
PASSING = ("torch.nn.modules.module", "torch.utils._contextlib", "contextlib", "functools")  # on the way of any call
_warn = warnings.warn


def _package(frame: FrameType) -> str:
    name = "tests" if frame.f_code.co_filename.startswith(TESTS) else frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


def _warn_or_raise(
    message: Warning | str, category: type[Warning] | None = None, stacklevel: int = 1, *rest: Any, **more: Any
) -> None:
    """Raise what is deprecated where lit_peft or a test is what called the package that says so.

    Python's filters see the line that warns, which lies in that package more often than not.
    """
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    # Dynamo makes an instance of every autograd function that it traces, and torch warns about that.
    is_ours = "should not be instantiated" not in str(message)
    if is_ours and issubclass(kind, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
        frame: FrameType | None = sys._getframe(1)
        package = _package(frame)
        while frame is not None and _package(frame) == package:
            frame = frame.f_back
        while frame is not None and frame.f_globals.get("__name__") in PASSING:
            frame = frame.f_back
        if frame is not None and _package(frame) in ("lit_peft", "tests"):
            raise kind(f"{message} (called from {frame.f_code.co_filename}:{frame.f_lineno})")
    _warn(message, category, stacklevel + 1, *rest, **more)


warnings.warn = _warn_or_raise  # type: ignore[assignment]


def pytest_xdist_auto_num_workers() -> int:
    """A worker takes about 2 GB, so a machine with many cores does not get one for each."""
    return min(os.cpu_count() or 2, 8)


@pytest.fixture
def new_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: nothing is found that another test or run has read."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIT_PEFT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    vocabulary = {word: at for at, word in enumerate([*specials, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>", model_max_length=64
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def _base(kind: str, tokenizer_folder: Path, folder: Path) -> Path:
    import shutil

    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    if kind == "bert":
        config = BertConfig(**shape, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3)
        AutoModel.from_config(config).save_pretrained(folder)
    else:
        config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, eos_token_id=4, pad_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base("bert", tokenizer_folder, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def decoder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base("llama", tokenizer_folder, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 distinct sentences whose label hangs on one word."""
    import csv
    import itertools

    file = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    mood = {"good": "pos", "great": "pos", "wonderful": "pos", "bad": "neg", "poor": "neg", "awful": "neg"}
    openings = itertools.product(("the", "this"), ("film", "story", "acting", "it"), ("is", "was"))
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        for opening, (word, label) in itertools.product(openings, mood.items()):
            writer.writerow([" ".join((*opening, word)), label])
    return file
