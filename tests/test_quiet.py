"""What commands print is theirs: no line of a library about itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

# Glog's lines, Python's warnings, and what parts of packages say that do not fit the machine.
FOREIGN = re.compile(
    r"^[WEI]\d{4} |Failed to load|deprecated|LeafSpec|\w+Warning:|Tip:|seed set|Be aware that|examples/s",
    re.IGNORECASE | re.MULTILINE,
)


# The arguments of several commands, in a process that imports everything once.
RUN = "import json, sys; from lit_peft.cli import main; print([main(a) for a in json.loads(sys.argv[1])])"


def printed(folder: Path, *commands: list[str]) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert str([0] * len(commands)) in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.heavy
def test_no_command_prints_lines_of_libraries(decoder: Path, encoder: Path, reviews: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{'the film ' * (1 + row % 5)}is good and it was {row}\n" for row in range(20)))
    others = tmp_path / "others.txt"
    others.write_text("the story was bad\nthis acting is great\n")
    data = ["--data", "CausalLMData", "--data.train", str(texts), "--data.max_length", "16", "--data.batch_size", "4"]
    model = ["--model", "LoRA", "--model.base", str(decoder), "--model.target_modules", "all-linear"]
    text = printed(tmp_path, ["fit", *model, *data, "--trainer.max_steps", "3"])
    config, checkpoint = str(next(tmp_path.rglob("config.yaml"))), str(next(tmp_path.rglob("*.ckpt")))
    run = ["--config", config, "--ckpt_path", checkpoint]
    adapter = ["--base", str(decoder), "--adapter", str(next(tmp_path.rglob("adapter_config.json")).parent)]
    rows = {"train": str(reviews), "validation_fraction": 0.2, "test_fraction": 0.2, "batch_size": 8}
    plan: dict[str, Any] = {
        "base": str(encoder),
        "task": "sequence_classification",
        "data": {"class_path": "TextClassificationData", "init_args": rows},
        "methods": {"LoRA": {"target_modules": ["query"], "learning_rate": 1e-3}},
        "trainer": {"accelerator": "cpu"},
        "output": str(tmp_path / "compare"),
        **dict.fromkeys(("steps", "trials", "seeds", "evaluations"), 1),
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(plan))
    text += printed(
        tmp_path,
        ["test", *run, "--data.test", str(others)],
        ["predict", *run, "--data.predict", str(others)],
        ["data", "--config", config],
        ["info", adapter[-1]],
        ["export", "--ckpt_path", checkpoint, "--output", "exported"],
        ["merge", *adapter, "--output", "merged"],
        ["generate", *adapter, "--prompt", "the film"],
        ["compare", "--config", "compare.yaml"],
    )
    text += printed(tmp_path, ["doctor"])  # by itself: it imports what others do not
    assert not [line for line in text.splitlines() if FOREIGN.search(line)]
