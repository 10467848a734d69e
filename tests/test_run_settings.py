"""Settings of a run on the command line: how long it lasts, and names that do not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_peft.cli import main


def arguments(decoder: Path, reviews: Path, folder: Path) -> list[str]:
    model = ["--model", "LoRA", "--model.base", str(decoder), "--data", "CausalLMData", "--data.train", str(reviews)]
    size = ["--data.limit_train", "16", "--data.batch_size", "8", "--trainer.accelerator", "cpu"]
    return ["fit", *model, *size, "--trainer.default_root_dir", str(folder), "--trainer.limit_val_batches", "0"]


def steps(folder: Path) -> int:
    (last,) = folder.rglob("last.ckpt")
    return int(torch.load(last, weights_only=True)["global_step"])


def test_a_run_without_a_length_trains_three_epochs_and_says_so(
    decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    assert main(arguments(decoder, reviews, tmp_path)) == 0
    assert "length:    3 epochs, 6 steps (the default: set --trainer.max_epochs" in capsys.readouterr().out
    assert steps(tmp_path) == 6
    written = yaml.safe_load((tmp_path / "version_0" / "config.yaml").read_text())
    assert written["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize("given", [["--trainer.max_epochs", "5"], ["--trainer.max_steps", "10"]])
def test_a_length_that_is_given_is_kept(
    given: list[str],
    decoder: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    assert main([*arguments(decoder, reviews, tmp_path), *given]) == 0
    out = capsys.readouterr().out
    assert "10 steps" in out and "the default" not in out and steps(tmp_path) == 10


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--model.nonsense", "{}"], "model.nonsense is not a setting of LoRA"),
        (["--model.nonsense={}"], "model.nonsense"),
        (["--model.init_args.lora_alpa={}"], "'lora_alpha'"),
        (["--data.nonsense={}"], "data.nonsense is not a setting of CausalLMData"),
        (["--model.nonsense=1"], "nonsense"),
    ],
)
def test_unknown_names_are_refused_whatever_their_value(
    given: list[str],
    named: str,
    decoder: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    assert main([*arguments(decoder, reviews, tmp_path), *given]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["model", "data"])
def test_unknown_empty_names_in_a_file_are_refused(
    part: str,
    decoder: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    settings: dict[str, Any] = {
        "model": {"class_path": "LoRA", "init_args": {"base": str(decoder), "rank_pattern": {}}},
        "data": {"class_path": "CausalLMData", "init_args": {"train": str(reviews)}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path / "runs")},
    }
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(file)]) == 0
    settings[part]["init_args"]["nonsense"] = {}
    file.write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(file)]) == 2
    assert f"{part}.nonsense is not a setting" in capsys.readouterr().err
