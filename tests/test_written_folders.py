"""What stands in the folders we write: the configurations that peft and AdapterHub wrote of the same, and cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GOLDEN, batch, make, scramble
from safetensors import safe_open

import lit_peft
from lit_peft import AdapterPSettings, LoRASettings, PromptTuningSettings, PTuningV2Settings
from lit_peft.methods.attachment import attachment_of

REFERENCES = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
# What stands otherwise in a peft folder of ours: networks that made a prompt or prefix are folded away, modules have
# their full names, no start of a prompt and no path of a base is known, and nothing counts heads.
OTHERWISE = {
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_reparameterization_type",
    "init_weights",
    "modules_to_save",
    "num_attention_heads",
    "prefix_projection",
    "target_modules",
}


def cases(library: str) -> list[Any]:
    return [pytest.param(case.parent, id=case.parent.name) for case in sorted((GOLDEN / library).glob("*/case.json"))]


def loaded(case: Path) -> Any:
    import transformers

    facts = json.loads((case / "case.json").read_text())
    model = getattr(transformers, facts["auto_class"]).from_pretrained(case / "base")
    lit_peft.load_adapter(model, case / "adapter")
    assert attachment_of(model).settings.method == facts["method"]
    return model


def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return values


@REFERENCES
@pytest.mark.parametrize("case", cases("peft"))
def test_pefts_configurations(case: Path, tmp_path: Path) -> None:
    theirs = config(case / "adapter")
    ours = config(lit_peft.save_adapter(loaded(case), tmp_path / "ours", format="peft"))
    assert set(ours) - set(theirs) <= {"lit_peft"} and not ours.get("prefix_projection")
    for name in set(ours) & set(theirs) - OTHERWISE:
        assert ours[name] == theirs[name], name


@REFERENCES
@pytest.mark.parametrize("case", cases("adapters"))
def test_adapterhubs_configurations(case: Path, tmp_path: Path) -> None:
    theirs = config(case / "adapter")
    folder = lit_peft.save_adapter(loaded(case), tmp_path / "ours", format="adapterhub", name="ref")
    ours = config(folder)
    for part, whole in ((ours["config"], theirs["config"]), (ours, theirs)):
        for name in set(part) - {"config", "lit_peft", "model_name"}:
            assert part[name] == whole[name], name
    assert ours["model_name"] == str(case / "base")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert stored.metadata() == {"format": "pt"}


@pytest.mark.parametrize("base", ["org/model", "/models/base", "pkg:some-base", "three/parts/long", "."])
def test_the_card(base: str, tmp_path: Path) -> None:
    model = make("llama")
    model.name_or_path = base
    lit_peft.attach(model, PromptTuningSettings(num_virtual_tokens=3, tokenizer_name_or_path=None))
    lines = (lit_peft.save_adapter(model, tmp_path / "ours") / "README.md").read_text().splitlines()
    front = lines[1 : lines.index("---", 1)]
    tags = ["library_name: peft", "tags:", "- lit-peft", "- prompt-tuning"]
    assert front == [*(["base_model: org/model"] if base == "org/model" else []), *tags]
    assert f"Trained on `{base}` with `PromptTuningSettings`:" in lines
    assert "| num_virtual_tokens | 3 |" in lines and not any(line.endswith("| None |") for line in lines)
    assert f"{lit_peft.trainable_parameters(model):,} trained parameters in this folder." in lines


def test_a_card_leaves_out_what_is_not_set(tmp_path: Path) -> None:
    model = lit_peft.attach(make("llama"), LoRASettings(target_modules="(a|.*q)_proj"))
    card = (lit_peft.save_adapter(model, tmp_path / "ours") / "README.md").read_text()
    assert r"| target_modules | (a\|.*q)_proj |" in card
    assert "rank_pattern" not in card and "None" not in card


def test_a_head_beside_an_adapterhub_folder(tmp_path: Path) -> None:
    model = lit_peft.attach(make("bert"), AdapterPSettings(modules_to_save=["classifier"]))
    folder = lit_peft.save_adapter(model, tmp_path / "ours", format="adapterhub", name="x")
    with safe_open(folder / "model_head.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt"} and set(stored.keys()) == {"classifier.weight", "classifier.bias"}
    head = json.loads((folder / "head_config.json").read_text())
    assert head["config"] is head["name"] is None and head["model_class"] == "BertForSequenceClassification"
    again = lit_peft.load_adapter(make("bert"), folder)
    assert set(attachment_of(again).saved) == {"classifier.weight", "classifier.bias"}


def test_a_tied_head_beside_an_adapterhub_folder(tmp_path: Path) -> None:
    model = lit_peft.attach(make("gpt2"), AdapterPSettings(modules_to_save=["lm_head"]))
    scramble(model)
    folder = lit_peft.save_adapter(model, tmp_path / "ours", format="adapterhub")
    again = lit_peft.load_adapter(make("gpt2"), folder)
    assert torch.equal(again.eval()(**batch("gpt2")).logits, model.eval()(**batch("gpt2")).logits)


def test_a_prefixs_modules_and_parameters(tmp_path: Path) -> None:
    for number, saved in enumerate((["classifier"], ["classifier.weight"], ["bert.pooler", "classifier.bias"])):
        model = lit_peft.attach(make("bert"), PTuningV2Settings(modules_to_save=saved))
        folder = lit_peft.save_adapter(model, tmp_path / str(number), format="peft")
        settings = attachment_of(lit_peft.load_adapter(make("bert"), folder)).settings
        assert settings.modules_to_save == saved and isinstance(settings, PTuningV2Settings)
