"""A LoRA that is part of the base for the length of a block."""

from __future__ import annotations

import copy

import pytest
import torch
from models import close, make, scramble

import lit_peft
from lit_peft import LitPeftError, LoRASettings


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_is_the_same_and_the_base_too(name: str, settings: dict[str, object]) -> None:
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    targets = "all-linear" if "init_lora_weights" not in settings else None
    lit_peft.attach(model, LoRASettings(r=4, target_modules=targets, **settings))  # type: ignore[arg-type]
    scramble(model)
    adapted = copy.deepcopy(model.state_dict())
    ids = torch.randint(3, 61, (2, 7))
    prompt = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": ids, "labels": ids}
    tokens, logits = model.generate(ids, **prompt), model(**inputs).logits
    with lit_peft.merged_adapter(model):
        assert torch.equal(model.generate(ids, **prompt), tokens)
        close(model(**inputs).logits, logits, 1e-4)
    assert torch.equal(model(**inputs).logits, logits)
    for key, value in model.state_dict().items():
        assert torch.equal(value, adapted[key]), key
    lit_peft.detach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_error_in_the_block_gives_the_base_back() -> None:
    model = lit_peft.attach(make("llama"), LoRASettings(r=4))
    scramble(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    with pytest.raises(RuntimeError, match="stop"), lit_peft.merged_adapter(model):
        assert not torch.equal(weight, before)
        raise RuntimeError("stop")
    assert torch.equal(weight, before)


def test_blocks_in_each_other_and_adapters_that_are_merged() -> None:
    model = lit_peft.attach(make("llama"), LoRASettings(r=4))
    scramble(model)
    layer = model.model.layers[0].self_attn.q_proj
    with lit_peft.merged_adapter(model):
        with lit_peft.merged_adapter(model):
            assert layer.merged
        assert layer.merged
    assert not layer.merged
    lit_peft.merge_adapter(model)
    with lit_peft.merged_adapter(model):
        pass
    assert layer.merged


def test_other_models_are_refused() -> None:
    for model in (make("llama"), lit_peft.attach(make("llama"), lit_peft.AdapterHSettings())):
        with pytest.raises(LitPeftError, match=r"No LoRA or \(IA\)³ is active"), lit_peft.merged_adapter(model):
            pass
