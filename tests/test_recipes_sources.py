"""The recipes of LLaMA-Factory, LitGPT, torchtune, peft and QLoRA run for a few steps on their own data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lit_peft.cli import main

ROOT = Path(__file__).parents[1]
DECODERS = ("llamafactory_lora_sft", "litgpt_lora", "torchtune_packed_lora", "qlora_guanaco_paged")
ENCODERS = ("peft_sequence_classification", "peft_token_classification")
# What the banner says of the data.
SAID = {
    "llamafactory_lora_sft": "from 'configs/recipes/data/identity.jsonl', which has",
    "peft_sequence_classification": "val_accuracy",
    "peft_token_classification": "val_f1",
}


def run(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, object]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    config = ROOT / "configs" / "recipes" / f"{name}.yaml"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path / "runs")]
    assert main(["fit", "--config", str(config), "--model.base", str(base), *quiet, *more]) == 0
    folder = tmp_path / "runs" / "version_0"
    assert (folder / "adapter" / "adapter_config.json").is_file()
    written: dict[str, object] = yaml.safe_load((folder / "config.yaml").read_text())
    return written


@pytest.mark.parametrize("name", DECODERS)
def test_a_recipe_for_decoders_runs(
    name: str, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "qlora" in name:
        pytest.importorskip("bitsandbytes")
    run(name, decoder, tmp_path, monkeypatch, "--trainer.max_steps", "4")
    out = capsys.readouterr().out
    assert "train_loss" in out and SAID.get(name, "") in out


@pytest.mark.parametrize("name", ENCODERS)
def test_a_recipe_for_encoders_runs(
    name: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, encoder, tmp_path, monkeypatch)
    assert SAID[name] in capsys.readouterr().out


def test_the_paged_optimizer_is_that_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import torch

    from lit_peft.training.optimizer import make_optimizer

    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / "qlora_guanaco_paged.yaml").read_text())
    settings = recipe["model"]["init_args"]
    weight = torch.nn.Parameter(torch.ones(64, 64))
    made = make_optimizer([{"params": [weight]}], settings["optimizer"], 0.1, settings["optimizer_args"])
    assert isinstance(made, bitsandbytes.optim.PagedAdamW32bit) and made.is_paged
