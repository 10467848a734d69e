"""Which causal models of transformers have default targets for LoRA, and that these act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_expert_lora import BASE, DEEPSEEK, IDS, moe, scramble
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lit_peft
from lit_peft import LoRASettings
from lit_peft.methods.attachment import attachment_of
from lit_peft.methods.targets import default_targets, find_targets
from lit_peft.util.errors import LitPeftError

# Model types whose attention has no linear layer of a name that others use.
WITHOUT = {
    "gemma4_unified_assistant": "reads the keys and values of another model",
    "rwkv": "no attention",
    "xlnet": "projections are parameters",
}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8, "expand": 2, "pad_token_id": 0}


def small(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        ("deepseek_v2", None, ["q_b_proj", "kv_b_proj"]),
        ("deepseek_v3", None, ["q_b_proj", "kv_b_proj"]),
        ("deepseek_v3", {**BASE, **DEEPSEEK, "q_lora_rank": None}, ["q_proj", "kv_b_proj"]),
        ("jetmoe", None, ["kv_proj"]),
        ("mamba", MAMBA, ["in_proj"]),
        ("mamba2", {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1}, ["in_proj"]),
        ("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "vocab_size": 64}, ["Wq", "Wv"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_default_targets_act(kind: str, settings: Any, names: list[str]) -> None:
    model = moe(kind) if settings is None else small(kind, **settings)
    assert default_targets(model) == names
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    lit_peft.attach(model, LoRASettings(r=2))
    scramble(model)
    assert len(attachment_of(model).adapted) == 2 * len(names), "in each of the two layers"
    out = model(input_ids=IDS, labels=IDS)
    assert not torch.allclose(out.logits, before)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.heavy
def test_which_causal_models_have_no_default_targets() -> None:
    without = set()
    built = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind))
        except Exception:  # its default configuration makes no model
            continue
        built += 1
        try:
            find_targets(model, default_targets(model))
        except LitPeftError:
            without.add(kind)
    assert built > 150
    assert without <= set(WITHOUT), "name their projections in lit_peft/methods/targets.py, or here with the reason"
