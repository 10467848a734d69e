"""What `fault_campaign.py` runs the commands on, and how it reads what they write."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

WORDS = "a bad film good great is it of poor the this was well weak wonderful awful story acting".split()  # noqa: SIM905
TRAINING = {
    "model": {"class_path": "LoRA", "init_args": {"r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}},
    "trainer": {
        "max_epochs": 3,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "default_root_dir": "runs",
        "enable_progress_bar": False,
    },
}


class FileEvents:
    """An audit hook that counts the changes of files below a folder and ends the process group before one of them."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink")

    def __init__(self, folder: Path, deadly: int | None) -> None:
        self.folder, self.deadly, self.count, self.process = str(folder), deadly, 0, os.getpid()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in self.CHANGES:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if (os.path.isabs(path) and not path.startswith(self.folder)) or os.getpid() != self.process:
            return
        self.count += 1
        if self.count == self.deadly:
            os.killpg(self.process, signal.SIGKILL)


def make_inputs(folder: Path) -> None:
    """Write a base, a data set, a trained run and its adapter, and the configurations."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "</s>"]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    draw = random.Random(0)
    for name in ("reviews.csv", "others.csv"):
        rows = [" ".join(draw.choices(WORDS, k=6)) for _ in range(44)]
        (folder / name).write_text("\n".join(["text", *rows, ""]))
    data = {"class_path": "CausalLMData", "init_args": {"train": str(folder / "reviews.csv"), "batch_size": 4}}
    settings = {**TRAINING, "data": data}
    settings["model"]["init_args"]["base"] = str(folder / "base")  # type: ignore[index]
    (folder / "fit.yaml").write_text(yaml.safe_dump(settings))
    compared = {
        "base": str(folder / "base"),
        "task": "causal_lm",
        "data": {"class_path": "CausalLMData", "init_args": {**data["init_args"], "validation_fraction": 0.2}},
        "methods": {"LoRA": {}, "PromptTuning": {"num_virtual_tokens": 2}},
        "trainer": {"accelerator": "cpu"},
        **{"steps": 2, "evaluations": 1, "trials": 1, "seeds": 1, "output": "compared"},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(compared))


def read_everything(room: Path) -> None:
    """Read every file under a final name; raise if one is not whole."""
    import torch
    from safetensors.torch import load

    for file in sorted(room.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(room).parts):
            continue
        try:
            if file.suffix == ".safetensors":
                load(file.read_bytes())
            elif file.suffix == ".ckpt":
                assert torch.load(file, weights_only=True)["state_dict"]
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".jsonl":
                # A line of results.jsonl is appended; only complete lines count.
                lines = file.read_text().split("\n")
                assert file.name == "results.jsonl" or not lines[-1]
                [json.loads(line) for line in lines[:-1]]
            elif file.suffix == ".csv":
                rows = list(csv.reader(file.read_text().splitlines()))
                assert not rows or {len(row) for row in rows} == {len(rows[0])}
            elif file.suffix == ".yaml":
                assert yaml.safe_load(file.read_text())
        except Exception as problem:
            raise ValueError(f"{file.relative_to(room)}: {problem!r}") from problem


def results_of(room: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """The contents of the files that match the patterns, without paths, times and memory."""
    import torch

    found: dict[str, Any] = {}
    for file in (file for pattern in patterns for file in sorted(room.glob(pattern))):
        # A start that could not write its configuration leaves a version without one; the next takes another number.
        name, content = re.sub(r"version_\d+", "version_N", str(file.relative_to(room))), file.read_bytes()
        if file.suffix == ".ckpt":
            state = torch.load(file, weights_only=True)
            found[name] = {key: value.tolist() for key, value in state["state_dict"].items()}, state["global_step"]
        elif file.name == "results.jsonl":
            keys = ("method", "learning_rate", "seed", "validation", "test")
            found[name] = [[json.loads(line).get(key) for key in keys] for line in content.splitlines()]
        else:
            found[name] = content.replace(str(room).encode(), b"ROOM")
    return found
