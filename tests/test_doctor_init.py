"""`lit-peft doctor` and `lit-peft init`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lit_peft.cli import main
from lit_peft.commands import doctor


def test_memory_counts_the_models_own_parameters(decoder: Path) -> None:
    base = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(decoder).parameters())
    full = doctor.memory(str(decoder), "FullFineTuning", "causal_lm", 2, 16)
    assert [full["parameters"], full["gradients"], full["Adam's moments"]] == [4 * base, 4 * base, 8 * base]
    lora = doctor.memory(str(decoder), "LoRA", "causal_lm", 2, 16)
    extra = lora["parameters"] - 4 * base
    assert lora["gradients"] == extra > 0 and lora["Adam's moments"] == 2 * extra
    # 34 s b h + 5 a s^2 b bytes for each layer in half precision; twice in single.
    assert lora["activations, about"] == 2 * 2 * (34 * 16 * 2 * 32 + 5 * 4 * 16**2 * 2)


def test_doctor_says_what_is_missing_and_what_fits(
    decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_OPTIONAL", {"no_such_package": ("nothing", "pip install it")})
    monkeypatch.setattr(doctor, "available", lambda: {"large": 2**40, "small": 1})
    assert main(["doctor", "--base", str(decoder)]) == 0
    said = capsys.readouterr().out
    assert "missing  (nothing)  ->  pip install it" in said
    assert "fits" in said.partition("  large")[2].splitlines()[0]
    assert "does not fit" in said.rpartition("  small")[2]
    assert main(["doctor", "--method", "Lora"]) == 2


def test_what_init_writes_runs(
    encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    flags = ["--task", "sequence_classification", "--base", str(encoder), "--method", "LoRA", "--data", str(reviews)]
    assert main(["init", *flags]) == 0
    assert main(["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]) == 0
    before = Path("config.yaml").read_bytes()
    capsys.readouterr()
    assert main(["init", *flags]) == 2
    assert "exists" in capsys.readouterr().err and Path("config.yaml").read_bytes() == before
    for change, word in ((["--data", "none.csv"], "'none.csv'"), (["--method", "Lora"], "'LoRA'")):
        assert main(["init", *flags, *change, "--output", "other.yaml"]) == 2
        assert word in capsys.readouterr().err and not Path("other.yaml").exists()
