"""Several LoRAs active at the same time: against peft, and against the sum of their updates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lit_peft
from lit_peft import AdapterPSettings, LitPeftError, LoRASettings
from lit_peft.models.quantization import quantize

TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(12).view(2, 6)
A = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
B = {"r": 4, "lora_alpha": 3, "target_modules": ["v_proj", "down_proj", "embed_tokens"], "use_rslora": True}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, **HEADS)).eval()


def randomize(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two adapters of peft."""
    for seed, (name, settings) in enumerate({"a": A, "b": B}.items()):
        model = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
        randomize(model, seed + 1)
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in "ab"}


def with_both(folders: dict[str, Path], model: Any = None) -> Any:
    model = llama() if model is None else model
    for name, folder in folders.items():
        lit_peft.load_adapter(model, folder, name=name)
    return model


def test_outputs_and_gradients_are_pefts(folders: dict[str, Path]) -> None:
    theirs = peft.PeftModel.from_pretrained(llama(), folders["a"], "a", is_trainable=True).eval()
    theirs.load_adapter(folders["b"], "b", is_trainable=True)
    theirs.base_model.set_adapter(["a", "b"])
    expected = theirs(input_ids=IDS, labels=IDS)
    model = with_both(folders)
    alone = model(IDS).logits
    lit_peft.set_adapter(model, ["a", "b"])
    assert lit_peft.active_adapter(model) == ("a", "b")
    out = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert (out.logits - alone).abs().max() > 1e-2
    out.loss.backward()
    expected.loss.backward()
    grads = [
        sorted(float(p.grad.norm()) for p in m.parameters() if p.requires_grad and p.grad is not None)
        for m in (model, theirs)
    ]
    assert len(grads[0]) == 2 * (4 + 4) + 2
    torch.testing.assert_close(torch.tensor(grads[0]), torch.tensor(grads[1]), atol=1e-6, rtol=1e-4)


def test_each_is_as_before_when_it_is_alone_again(folders: dict[str, Path], tmp_path: Path) -> None:
    model = with_both(folders)
    alone = {}
    for name in (None, "a", "b"):
        with lit_peft.use_adapter(model, name):
            alone[name] = model(IDS).logits
    names = {name for name, _ in model.named_parameters()}
    lit_peft.set_adapter(model, ["b", "a"])
    together = model(IDS).logits
    with lit_peft.use_adapter(model, ("a",)):
        assert lit_peft.active_adapter(model) == "a"
        assert torch.equal(model(IDS).logits, alone["a"])
    with lit_peft.row_adapters(model, ["a", None]), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, torch.stack([alone["a"][0], alone[None][1]]))
    assert torch.equal(model(IDS).logits, together)
    torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, together)
    with pytest.raises(LitPeftError, match="several adapters are active"):
        lit_peft.save_adapter(model, tmp_path / "both")
    for name in ("a", "b"):
        lit_peft.set_adapter(model, name)
        assert torch.equal(model(IDS).logits, alone[name])
        lit_peft.save_adapter(model, tmp_path / f"again_{name}")
        again = lit_peft.load_adapter(llama(), tmp_path / f"again_{name}")
        assert torch.equal(again(IDS).logits, alone[name])
    assert {name for name, _ in model.named_parameters()} == names
    lit_peft.set_adapter(model, ["a", "b"])
    lit_peft.detach(model)
    assert torch.equal(model(IDS).logits, llama()(IDS).logits) and lit_peft.adapter_names(model) == []
    assert model.state_dict().keys() == llama().state_dict().keys()


def test_both_are_merged_as_peft_merges_them(folders: dict[str, Path]) -> None:
    theirs = peft.PeftModel.from_pretrained(llama(), folders["a"], "a")
    theirs.load_adapter(folders["b"], "b")
    expected = theirs.merge_and_unload(adapter_names=["a", "b"])(IDS).logits
    model = with_both(folders)
    lit_peft.set_adapter(model, ["a", "b"])
    before = model(IDS).logits
    lit_peft.merge_adapter(model)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    lit_peft.unmerge_adapter(model)
    assert torch.equal(model(IDS).logits, before)
    torch.testing.assert_close(lit_peft.merge_and_unload(model)(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert lit_peft.adapter_names(model) == [] and model.state_dict().keys() == llama().state_dict().keys()


def test_both_learn_with_dropout_and_in_bfloat16(folders: dict[str, Path]) -> None:
    model = with_both(folders, llama().to(torch.bfloat16)).train()
    lit_peft.add_adapter(model, "c", LoRASettings(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    lit_peft.set_adapter(model, ["a", "b", "c"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_trained_modules_of_one_are_active_with_the_other() -> None:
    model = llama()
    lit_peft.add_adapter(model, "a", LoRASettings(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomize(model, 1)
    head = model.lm_head.weight.detach().clone()
    lit_peft.add_adapter(model, "b", LoRASettings(target_modules=["q_proj", "down_proj"]))
    randomize(model, 2)
    lit_peft.set_adapter(model, ["b", "a"])
    assert torch.equal(model.lm_head.weight, head) and model.lm_head.weight.requires_grad
    lit_peft.set_adapter(model, "b")
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight) and not model.lm_head.weight.requires_grad


@pytest.mark.filterwarnings("ignore:.*experts:UserWarning")
def test_experts_and_attentions() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**TINY, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    model: Any = MixtralForCausalLM(config).eval()
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    for net, settings, run in (
        (model, LoRASettings(r=2, target_modules=["q_proj"], target_experts=True), lambda: model(IDS).logits),
        (layer, LoRASettings(r=2, target_modules=["self_attn", "linear1"]), lambda: layer(x)),
    ):
        for seed, name in enumerate("ab"):
            lit_peft.add_adapter(net, name, settings)
            randomize(net, seed)
        with torch.no_grad():
            lit_peft.set_adapter(net, ["a", "b"])
            together = run()
            merged = lit_peft.merge_and_unload(copy.deepcopy(net))
            expected = merged(IDS).logits if net is model else merged(x)
            torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-4)
            lit_peft.combine_adapters(net, "sum", {"a": 1, "b": 1})
            torch.testing.assert_close(run(), together, atol=1e-5, rtol=1e-4)


def test_a_quantized_base_is_merged_with_the_sum() -> None:
    model = llama()
    quantize(model, "int8")
    for seed, name in enumerate("ab"):
        lit_peft.add_adapter(model, name, LoRASettings(r=2, target_modules="all-linear"))
        randomize(model, seed)
    lit_peft.set_adapter(model, ["a", "b"])
    expected = model(IDS).logits
    with pytest.raises(LitPeftError, match="quantized"):
        lit_peft.merge_adapter(model)
    torch.testing.assert_close(model(IDS).logits, expected, atol=0, rtol=0)
    torch.testing.assert_close(lit_peft.merge(model)(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (AdapterPSettings(), r"'other' \(adapter_p\).*lit_peft\.Stack"),
        (LoRASettings(use_dora=True), "use_dora=True"),
        (LoRASettings(init_lora_weights="pissa"), "init_lora_weights"),
        (LoRASettings(trainable_token_indices=[1]), "trainable_token_indices"),
        (LoRASettings(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head.weight in full.*'a'"),
        (LoRASettings(target_modules=["q_proj"], modules_to_save=["v_proj"]), "'other'.*'a'.*v_proj.weight in full"),
    ],
)
def test_adapters_that_cannot_be_added_are_refused(settings: Any, why: str) -> None:
    model = llama()
    lit_peft.add_adapter(model, "a", LoRASettings(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    lit_peft.add_adapter(model, "other", settings)
    with pytest.raises(LitPeftError, match=why):
        lit_peft.set_adapter(model, ["a", "other"])
    assert lit_peft.active_adapter(model) == "other"


def test_lists_of_names_are_checked() -> None:
    model = lit_peft.add_adapter(llama(), "a", LoRASettings())
    for names in ([], ["a", "a"]):
        with pytest.raises(LitPeftError, match="different adapters"):
            lit_peft.set_adapter(model, names)
    with pytest.raises(LitPeftError, match="no adapter 'b'"):
        lit_peft.set_adapter(model, ["a", "b"])
