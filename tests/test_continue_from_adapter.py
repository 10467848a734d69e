"""`model.adapter`: training that starts from the weights in an adapter's folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from models import QUIET, scramble, trained_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lit_peft
from lit_peft import CausalLMData, LitPeftError, TextClassificationData
from lit_peft.cli import main

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"]},
    "IA3": {"target_modules": ["v_proj", "up_proj"]},
    "AdapterH": {"reduction_factor": 4},
    "AdapterP": {"reduction_factor": 4},
    "Parallel": {"bottleneck_size": 5},
    "PrefixTuning": {"num_virtual_tokens": 3, "prefix_projection": False},
    "PTuningV2": {"num_virtual_tokens": 3},
    "PTuning": {"num_virtual_tokens": 3, "encoder_reparameterization_type": "MLP"},
    "PromptTuning": {"num_virtual_tokens": 3},
}
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def settings_of(method: str, **values: Any) -> Any:
    return getattr(lit_peft, f"{method}Settings")(**values)


def save(base: Path, folder: Path, method: str = "LoRA", **values: Any) -> Any:
    """Write the folder of an adapter whose weights are not those of a start; return the model."""
    model = lit_peft.attach(AutoModelForCausalLM.from_pretrained(base), settings_of(method, **values))
    scramble(model)
    lit_peft.save_adapter(model, folder)
    return model.eval()


def fit(base: Path, reviews: Path, folder: Path, resume: Any = None, epochs: int = 1, **settings: Any) -> Any:
    pl.seed_everything(0)
    data = CausalLMData(base=str(base), train=str(reviews), max_length=16, limit_train=16, batch_size=4)
    module = lit_peft.LoRA(**{"base": str(base), "r": 3, "lora_alpha": 5, "lr_scheduler": "constant", **settings})
    length = {"max_epochs": epochs, "limit_val_batches": 0}
    trainer = pl.Trainer(**length, default_root_dir=folder, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_its_folder(method: str, decoder: Path, tmp_path: Path) -> None:
    expected = save(decoder, tmp_path / "adapter", method, **METHODS[method])
    module = getattr(lit_peft, method)(base=str(decoder), adapter=str(tmp_path / "adapter"), **METHODS[method])
    module.configure_model()
    with torch.no_grad():
        found = module.model.eval()(**IDS).logits
        torch.testing.assert_close(found, expected(**IDS).logits, atol=1e-6, rtol=1e-5)
    module.model.train()
    module.training_step({**IDS, "labels": IDS["input_ids"]}, 0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained_of(module.model).values())
    # And again, from what this one saves.
    lit_peft.save_adapter(module.model, tmp_path / "again")
    again = getattr(lit_peft, method)(base=str(decoder), adapter=str(tmp_path / "again"), **METHODS[method])
    again.configure_model()
    for name, value in trained_of(again.model).items():
        torch.testing.assert_close(value, trained_of(module.model)[name])


def test_the_folder_of_peft_is_a_start(decoder: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), config)
    with torch.no_grad():
        for parameter in trained_of(theirs).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    # What is unset is taken from the folder; the dropout of training is one's own.
    module = lit_peft.LoRA(base=str(decoder), adapter=str(tmp_path / "adapter"), r=3, lora_alpha=5)
    module.configure_model()
    assert (
        module.settings.target_modules
        == module.hparams.target_modules
        == [f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)]
    )
    assert module.settings.lora_dropout == 0.0
    torch.testing.assert_close(module.model.eval()(**IDS).logits, theirs.eval()(**IDS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (lit_peft.LoRA, {}, r"model.r is 8, and the adapter in .* has 3: give --model.r 3 --model.lora_alpha 5"),
        (lit_peft.LoRA, {"r": 3}, r"model.lora_alpha is 16, and .* has 5.*: give --model.lora_alpha 5"),
        (
            lit_peft.LoRA,
            {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]},
            r"does not fit: .*v_proj.* in the folder and not there in this module",
        ),
        (lit_peft.LoRA, {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}, "leave init_lora_weights out"),
        (lit_peft.AdapterH, {}, "is an adapter of LoRA, and the module is AdapterH: give --model LoRA"),
        (lit_peft.HeadOnly, {"task": "sequence_classification"}, "is an adapter of LoRA"),
    ],
)
def test_another_method_or_setting_is_refused_before_anything_is_loaded(
    kind: Any, settings: dict[str, Any], said: str, decoder: Path, tmp_path: Path
) -> None:
    save(decoder, tmp_path / "adapter", r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    module = kind(base=str(decoder), adapter=str(tmp_path / "adapter"), **settings)
    with pytest.raises(LitPeftError, match=said):
        module.check()


def test_the_adapter_of_another_base_is_refused(decoder: Path, tmp_path: Path) -> None:
    save(decoder, tmp_path / "adapter", r=3, lora_alpha=5)
    other, model = tmp_path / "other", AutoModelForCausalLM.from_pretrained(decoder)
    shutil.copytree(decoder, other)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(other)
    module = lit_peft.LoRA(base=str(other), adapter=str(tmp_path / "adapter"), r=3, lora_alpha=5)
    with pytest.raises(LitPeftError, match="its weights have other values"):
        module.configure_model()


def test_a_head_that_the_folder_lacks_is_new_and_said(
    decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(decoder, tmp_path / "adapter", r=3, lora_alpha=5)
    task = {"task": "sequence_classification", "num_labels": 2, "r": 3, "lora_alpha": 5}
    module = lit_peft.LoRA(base=str(decoder), adapter=str(tmp_path / "adapter"), **task)
    module.configure_model()
    assert "adapter:   score.weight not in the adapter's folder" in capsys.readouterr().out
    with torch.no_grad():
        module.model.score.weight.fill_(0.5)
    lit_peft.save_adapter(module.model, tmp_path / "with head")
    again = lit_peft.LoRA(base=str(decoder), adapter=str(tmp_path / "with head"), **task)
    again.configure_model()
    assert again.model.score.weight.eq(0.5).all() and "adapter:" not in capsys.readouterr().out
    loaded = lit_peft.load_adapter(
        AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=2), tmp_path / "with head"
    )
    module.model.config.pad_token_id = loaded.config.pad_token_id
    torch.testing.assert_close(again.model.eval()(**IDS).logits, loaded.eval()(**IDS).logits)


def test_training_goes_on_and_a_resumed_run_needs_no_folder(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    start = save(decoder, adapter, r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"])
    before = {name: value.clone() for name, value in trained_of(start).items()}
    given: dict[str, Any] = {"adapter": str(adapter), "target_modules": ["q_proj", "o_proj"], "learning_rate": 1e-6}
    module = fit(decoder, reviews, tmp_path / "run", **given)
    for name, value in trained_of(module.model).items():
        assert 0 < (value - before[name]).abs().max() < 1e-4
    assert lit_peft.save_adapter(module.model, tmp_path / "saved")
    assert "Training started from the adapter `adapter`" in (tmp_path / "saved" / "README.md").read_text()
    whole = fit(decoder, reviews, tmp_path / "whole", epochs=2, **given)
    shutil.rmtree(adapter)
    resumed = fit(decoder, reviews, tmp_path / "run", tmp_path / "run" / "1.ckpt", epochs=2, **given)
    for name, value in trained_of(resumed.model).items():
        assert torch.equal(value, trained_of(whole.model)[name])
    # Without the folder, what was taken from it must be given.
    loaded = lit_peft.LoRA.load_from_checkpoint(tmp_path / "run" / "1.ckpt")
    assert loaded.hparams.adapter == str(adapter)
    with pytest.raises(
        LitPeftError, match=r"does not exist any more.*give model.target_modules=\['q_proj', 'o_proj'\]"
    ):
        fit(decoder, reviews, tmp_path / "run", tmp_path / "run" / "1.ckpt", 2, **{**given, "target_modules": None})
    with pytest.raises(LitPeftError, match=r"model.adapter=.* does not exist: give the folder"):
        fit(decoder, reviews, tmp_path / "run", **given)


def test_the_command_starts_from_a_folder_and_tests_one(
    decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    save(decoder, tmp_path / "adapter", r=3, lora_alpha=5)
    model = ["--model", "LoRA", "--model.base", str(decoder), "--model.adapter", str(tmp_path / "adapter")]
    data = ["--data", "CausalLMData", "--data.train", str(reviews), "--data.test_fraction", "0.2"]
    place = ["--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.accelerator", "cpu"]
    options = [*model, *data, *place, "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *options, "--trainer.max_steps", "1"]) == 2
    assert "give --model.r 3 --model.lora_alpha 5" in capsys.readouterr().err
    assert not list((tmp_path).glob("runs/*"))
    options += ["--model.r", "3", "--model.lora_alpha", "5"]
    assert main(["fit", *options, "--trainer.max_steps", "1"]) == 0
    written = yaml.safe_load((tmp_path / "runs" / "version_0" / "config.yaml").read_text())
    assert written["model"]["init_args"]["adapter"] == str(tmp_path / "adapter")
    assert f"adapter:   training starts from the weights in {tmp_path / 'adapter'}" in capsys.readouterr().out
    assert (tmp_path / "runs" / "version_0" / "adapter" / "adapter_config.json").is_file()
    capsys.readouterr()
    assert main(["test", *options]) == 0
    assert "untrained" not in "".join(capsys.readouterr())
    assert main(["test", *options[:-6], "--model.adapter", "nowhere"]) == 2
    assert "model.adapter='nowhere' does not exist" in capsys.readouterr().err


def test_a_classifier_goes_on_with_other_labels_only_if_they_fit(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"base": str(encoder), "task": "sequence_classification", "r": 3, "lora_alpha": 5}
    first = lit_peft.LoRA(**values, num_labels=3)
    first.configure_model()
    lit_peft.save_adapter(first.model, tmp_path / "adapter")
    second = lit_peft.LoRA(**values, adapter=str(tmp_path / "adapter"))
    data = TextClassificationData(base=str(encoder), train=str(reviews), limit_train=8)
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    with pytest.raises(LitPeftError, match="classifier"):
        trainer.fit(second, data)
