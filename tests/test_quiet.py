"""What commands print is theirs: no line of a library about itself."""

from __future__ import annotations

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
    r"^[WEI]\d{4} |Failed to load|deprecated|LeafSpec|\w+Warning:|Tip:|seed set", re.IGNORECASE | re.MULTILINE
)


def printed(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-m", "lit_peft", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.heavy
def test_no_command_prints_lines_of_libraries(decoder: Path, encoder: Path, reviews: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{'the film ' * (1 + row % 5)}is good and it was {row}\n" for row in range(20)))
    others = tmp_path / "others.txt"
    others.write_text("the story was bad\nthis acting is great\n")
    data = ["--data", "CausalLMData", "--data.train", str(texts), "--data.max_length", "16", "--data.batch_size", "4"]
    model = ["--model", "LoRA", "--model.base", str(decoder), "--model.target_modules", "all-linear"]
    outputs = {"fit": printed(tmp_path, "fit", *model, *data, "--trainer.max_steps", "3")}
    adapter = next(tmp_path.rglob("adapter_config.json")).parent
    config, checkpoint = next(tmp_path.rglob("config.yaml")), next(tmp_path.rglob("*.ckpt"))
    run = ["--config", str(config), "--ckpt_path", str(checkpoint)]
    outputs["test"] = printed(tmp_path, "test", *run, "--data.test", str(others))
    outputs["predict"] = printed(tmp_path, "predict", *run, "--data.predict", str(others))
    outputs["data"] = printed(tmp_path, "data", "--config", str(config))
    outputs["info"] = printed(tmp_path, "info", str(adapter))
    outputs["export"] = printed(tmp_path, "export", "--ckpt_path", str(checkpoint), "--output", "exported")
    outputs["merge"] = printed(
        tmp_path, "merge", "--base", str(decoder), "--adapter", str(adapter), "--output", "merged"
    )
    outputs["generate"] = printed(
        tmp_path, "generate", "--base", str(decoder), "--adapter", str(adapter), "--prompt", "the film"
    )
    outputs["doctor"] = printed(tmp_path, "doctor")
    plan: dict[str, Any] = {
        "base": str(encoder),
        "task": "sequence_classification",
        "steps": 4,
        "trials": 1,
        "seeds": 1,
    }
    rows = {"train": str(reviews), "validation_fraction": 0.2, "test_fraction": 0.2, "batch_size": 8}
    plan["data"] = {"class_path": "TextClassificationData", "init_args": rows}
    plan["methods"] = {"LoRA": {"target_modules": ["query"], "learning_rate": 1e-3}}
    plan.update(trainer={"accelerator": "cpu"}, output=str(tmp_path / "compare"), evaluations=1)
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(plan))
    outputs["compare"] = printed(tmp_path, "compare", "--config", "compare.yaml")
    found = {name: [line for line in text.splitlines() if FOREIGN.search(line)] for name, text in outputs.items()}
    assert not {name: lines for name, lines in found.items() if lines}
