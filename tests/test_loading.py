"""One way to load a base: the module, the commands and `doctor` get the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lit_peft
from lit_peft import LitPeftError
from lit_peft.commands.options import base_options, load_base_from_options
from lit_peft.models.loading import BaseSettings, load_config
from lit_peft.training.building import build_empty_model


@pytest.mark.parametrize("task", ["causal_lm", "question_answering", "multiple_choice", "token_classification"])
def test_commands_load_the_same_weights_as_modules(task: str, decoder: Path) -> None:
    labels = {"num_labels": 3} if task == "token_classification" else {}
    module = lit_peft.HeadOnly(base=str(decoder), task=task, **labels)
    module.configure_model()
    frozen = {name: value for name, value in module.model.named_parameters() if not value.requires_grad}
    loaded = load_base_from_options(base_options(str(decoder), task=task, **labels))
    assert type(loaded) is type(module.model) and not loaded.training
    parameters = dict(loaded.named_parameters())
    assert frozen.keys() <= parameters.keys() and len(frozen) > 10
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    # transformers' own class has the backbone under another name for some tasks, and would leave it random.
    stored = AutoModelForCausalLM.from_pretrained(decoder).model.state_dict()
    backbone = getattr(loaded, loaded.base_model_prefix).state_dict()
    assert all(torch.equal(backbone[name], value) for name, value in stored.items())


def test_without_a_task_the_base_is_its_own_architecture(decoder: Path) -> None:
    model = load_base_from_options(base_options(str(decoder), dtype="bfloat16"))
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16


def test_labels_and_the_padding_token_of_a_new_head(decoder: Path, tmp_path: Path) -> None:
    shutil.copytree(decoder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": None, "eos_token_id": [7, 8]}))
    settings = BaseSettings(str(tmp_path))
    assert load_config(settings, ["a", "b"]).id2label == {0: "a", 1: "b"}
    assert load_config(settings, num_labels=5).num_labels == 5 and load_config(settings).pad_token_id is None
    assert load_config(settings, needs_padding=True).pad_token_id == 7


def test_a_task_without_weights_for_its_head_is_refused(encoder: Path) -> None:
    module = lit_peft.LoRA(base=str(encoder), task="causal_lm")
    with pytest.raises(LitPeftError, match="has no weights for cls"):
        module.configure_model()


def test_an_empty_model_has_the_shapes_of_the_real_one(decoder: Path) -> None:
    module = lit_peft.LoRA(base=str(decoder))
    empty = build_empty_model(module)
    module.configure_model()
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = {name: (value.shape, value.requires_grad) for name, value in empty.named_parameters()}
    assert shapes == {name: (value.shape, value.requires_grad) for name, value in module.model.named_parameters()}
