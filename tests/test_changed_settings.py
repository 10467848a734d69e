"""A checkpoint resumed with other settings: never is one value used and another recorded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import QUIET

import lit_peft
from lit_peft import CausalLMData, LitPeftError
from lit_peft.cli import main

GIVEN: dict[str, Any] = {"r": 4, "learning_rate": 1e-2, "lora_dropout": 0.0, "warmup_steps": 0}


def fit(base: Path, file: Path, folder: Path, resume: Any = None, **changes: Any) -> Any:
    trainer_changes = {name: changes.pop(name) for name in ("max_epochs", "max_steps") if name in changes}
    data_changes = {name: changes.pop(name) for name in ("batch_size", "shuffle_buffer") if name in changes}
    pl.seed_everything(changes.pop("seed_everything", 0))
    kind = changes.pop("kind", lit_peft.LoRA)
    module = kind(**{"base": str(base), **(GIVEN if kind is lit_peft.LoRA else {}), **changes})
    settings = {"batch_size": 8, **data_changes}
    data = CausalLMData(base=str(base), train=str(file), limit_train=24, max_length=16, **settings)
    length = {"max_epochs": 1, **trainer_changes}
    trainer = pl.Trainer(**length, default_root_dir=folder, enable_checkpointing=False, limit_val_batches=0, **QUIET)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "stored.ckpt")
    return trainer


@pytest.fixture(scope="module")
def stored(decoder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint from the end of the first epoch."""
    folder = tmp_path_factory.mktemp("run")
    fit(decoder, reviews, folder)
    return folder / "stored.ckpt"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 1e-3}, "model.learning_rate was 0.01 and is 0.001 now"),
        ({"learning_rate": None}, "model.learning_rate was 0.01 and is 0.0005 now"),
        ({"lora_alpha": 32}, "model.lora_alpha was 16 and is 32 now"),
        ({"lora_dropout": 0.1}, "model.lora_dropout was 0.0 and is 0.1 now"),
        ({"use_rslora": True}, "model.use_rslora was False and is True now"),
        ({"r": 2}, "model.r was 4 and is 2 now"),
        ({"target_modules": ["q_proj"]}, "model.target_modules was None"),
        ({"optimizer": "SGD"}, "model.optimizer was 'AdamW' and is 'SGD' now"),
        ({"optimizer_args": {"eps": 1e-6}}, "model.optimizer_args was {} and is {'eps': 1e-06} now"),
        ({"weight_decay": 0.1}, "model.weight_decay was 0.0 and is 0.1 now"),
        ({"lr_scheduler": "cosine"}, "model.lr_scheduler was 'linear' and is 'cosine' now"),
        ({"warmup_steps": 3}, "model.warmup_steps was 0 and is 3 now"),
        ({"seed_everything": 1}, "seed_everything was 0 and is 1 now"),
        ({"r": 2, "lora_alpha": 32}, "model.lora_alpha was 16 and is 32 now; model.r was 4 and is 2 now"),
    ],
    ids=str,
)
def test_what_a_checkpoint_fixes_is_refused(
    changes: dict[str, Any], said: str, stored: Path, decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    with pytest.raises(LitPeftError, match="was trained with other settings") as raised:
        fit(decoder, reviews, tmp_path, stored, max_epochs=2, **changes)
    assert said in str(raised.value) and "Give the old values" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gradient_checkpointing": True}, "model.gradient_checkpointing was False and is True now"),
        ({"supervised_loss": False}, "model.supervised_loss was True and is False now"),
        ({"generation": {"max_new_tokens": 3}}, "model.generation was {} and is {'max_new_tokens': 3} now"),
        ({"batch_size": 4}, "data.batch_size times devices was 8 and is 4 now"),
        ({"max_epochs": 4}, "the run had 3 steps and has 12 steps now"),
    ],
    ids=str,
)
def test_what_may_change_holds_and_is_said(
    changes: dict[str, Any],
    said: str,
    stored: Path,
    decoder: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = fit(decoder, reviews, tmp_path, stored, **{"max_epochs": 2, **changes})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed:")]
    assert sum(said in line for line in lines) == 1, lines
    recorded = torch.load(tmp_path / "stored.ckpt", weights_only=True)["run"]["settings"]
    given = {name: value for name, value in changes.items() if name in recorded}
    assert given.items() <= recorded.items()
    if "batch_size" in changes:
        assert trainer.global_step == 3 + 6


def test_nothing_is_said_if_nothing_changed(
    stored: Path, decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The method's usual rate, given or not, is the same setting.
    fit(decoder, reviews, tmp_path, learning_rate=None, lr_scheduler="constant")
    fit(decoder, reviews, tmp_path, tmp_path / "stored.ckpt", learning_rate=5e-4, lr_scheduler="constant", max_epochs=2)
    assert "resumed:" not in capsys.readouterr().out


def test_a_rate_that_the_finder_set_is_no_change(stored: Path, decoder: Path, reviews: Path, tmp_path: Path) -> None:
    content = torch.load(stored, weights_only=True)
    content["hyper_parameters"]["learning_rate"] = 0.123
    torch.save(content, tmp_path / "found.ckpt")
    assert fit(decoder, reviews, tmp_path, tmp_path / "found.ckpt", max_epochs=2).global_step == 6


def test_a_base_that_has_moved_is_the_same_and_another_is_refused(
    stored: Path, decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(decoder, moved)
    fit(moved, reviews, tmp_path, stored, max_epochs=2)
    assert f"model.base was {decoder} and is {moved} now, which has the same weights" in capsys.readouterr().out
    shutil.copytree(decoder, other)
    model = AutoModelForCausalLM.from_pretrained(decoder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(other)
    with pytest.raises(LitPeftError, match="has other weights"):
        fit(other, reviews, tmp_path, stored, max_epochs=2)


def test_evaluation_refuses_what_was_never_trained_and_ignores_how_it_was_trained(
    stored: Path, decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    trainer = pl.Trainer(default_root_dir=tmp_path, limit_test_batches=1, **QUIET)

    def test(**changes: Any) -> Any:
        data = CausalLMData(base=str(decoder), test=str(reviews), max_length=16)
        module = lit_peft.LoRA(base=str(decoder), **{**GIVEN, **changes})
        return trainer.test(module, data, ckpt_path=stored, verbose=False)[0]["test_loss"]

    assert test() == test(learning_rate=1.0, lora_dropout=0.5, optimizer="SGD", lr_scheduler="constant")
    with pytest.raises(LitPeftError, match=r"model.lora_alpha was 16 and is 64 now"):
        test(lora_alpha=64)


def test_the_command_refuses_before_it_writes_and_another_seed_is_another_run(
    decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    model = ["--model", "LoRA", "--model.base", str(decoder), "--data", "CausalLMData", "--data.train", str(reviews)]
    place = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    command = ["fit", *model, "--data.limit_train", "8", *place, "--trainer.enable_progress_bar", "false"]
    assert main(command) == 0
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert main([*command, "--ckpt_path", str(last), "--model.lora_alpha", "1"]) == 2
    assert "model.lora_alpha was 16.0 and is 1.0 now" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]
    assert main([*command, "--ckpt_path", "last", "--seed_everything", "1"]) == 0
    assert "No run of this model, data and seed" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"version_0", "version_1"}
