"""DeBERTa of the first version, whose queries, keys and values come from one `in_proj`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import scramble
from transformers import DebertaConfig, DebertaForMaskedLM, DebertaForSequenceClassification

import lit_peft
from lit_peft import (
    AdapterHSettings,
    AdapterPSettings,
    LitPeftError,
    LoRASettings,
    ParallelSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    PTuningSettings,
    PTuningV2Settings,
)

IDS = torch.arange(1, 15).view(2, 7)
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0


def deberta(model_class: Any = DebertaForMaskedLM) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 40}
    return model_class(DebertaConfig(**shape, **relative, num_attention_heads=4)).eval()


def run(model: Any) -> Any:
    return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "target_modules": ["in_proj", "pos_proj", "pos_q_proj"]}])
def test_lora_is_pefts_with_the_same_default_modules(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(deberta(), peft.LoraConfig(r=4, **settings)).eval()
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lit_peft.load_adapter(deberta(), tmp_path / "theirs")
    expected = run(theirs)
    assert (expected - run(deberta())).abs().max() > 1e-4
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)
    run(model).sum().backward()
    expected.sum().backward()
    norms = [sorted(float(p.grad.norm()) for p in m.parameters() if p.grad is not None) for m in (model, theirs)]
    torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]), atol=1e-5, rtol=1e-4)
    again = peft.PeftModel.from_pretrained(deberta(), lit_peft.save_adapter(model, tmp_path / "ours"))
    torch.testing.assert_close(run(again), run(model), atol=1e-5, rtol=1e-5)
    own = lit_peft.attach(deberta(), LoRASettings(r=4, **settings))
    assert {name for name, p in own.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("model_class", [DebertaForMaskedLM, DebertaForSequenceClassification])
@pytest.mark.parametrize(
    "settings",
    [
        AdapterHSettings(reduction_factor=2),
        AdapterPSettings(reduction_factor=2, original_ln_before=True),
        ParallelSettings(),
        PTuningSettings(num_virtual_tokens=3),
        PromptTuningSettings(num_virtual_tokens=3),
    ],
    ids=lambda settings: settings.method,
)
def test_other_methods_reach_every_parameter_and_come_back(settings: Any, model_class: Any, tmp_path: Path) -> None:
    model = deberta(model_class)
    before = run(model)
    lit_peft.attach(model, settings)
    scramble(model)
    out = run(model)
    assert out.shape[0] == 2 and (out[:, -7:] - before).abs().max() > 1e-5
    out.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unused == []
    again = lit_peft.load_adapter(deberta(model_class), lit_peft.save_adapter(model, tmp_path / "adapter"))
    torch.testing.assert_close(run(again), out)
    lit_peft.detach(model)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("settings", [PrefixTuningSettings(), PTuningV2Settings()])
def test_prefixes_are_refused(settings: Any) -> None:
    with pytest.raises(LitPeftError, match=r"computes attention in its own code.*use another method"):
        lit_peft.attach(deberta(), settings)
