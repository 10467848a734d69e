"""`ensure_weight_tying`: one update, or one trained copy, for an embedding and the head that shares its weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import LitPeftError, LoRASettings

TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
IDS = torch.arange(12).view(2, 6)
CASES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 3, "lm_head": 3}},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_rslora": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
]
PEFTS_WARNINGS = "ignore:.*save_embedding_layers.*:UserWarning"


def llama(tie: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie)
    return LlamaForCausalLM(config).eval()


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def settings(case: dict[str, Any]) -> dict[str, Any]:
    return {"r": 2, "ensure_weight_tying": True, **copy.deepcopy(case)}


@pytest.mark.filterwarnings(PEFTS_WARNINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_folders_go_both_ways(case: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings(case)))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(IDS).logits
    model = lit_peft.load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - llama()(IDS).logits).abs().max() > 1e-2
    again = peft.PeftModel.from_pretrained(llama(), lit_peft.save_adapter(model, tmp_path / "ours"))
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_uses_share_one_gradient_and_stay_tied_when_merged(case: dict[str, Any], tmp_path: Path) -> None:
    model, alone = llama(), llama()
    before = alone(IDS).logits
    randomize(lit_peft.attach(model, LoRASettings(**settings(case))))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4 - ("modules_to_save" in case) and not any("lm_head" in name for name in names)
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()

    # The same by hand: the updated table is one tensor, used twice.
    table = alone.lm_head.weight.detach().clone()
    layer = model.model.embed_tokens
    if "modules_to_save" in case:
        table = layer.weight.detach().clone().requires_grad_()
        own = table
    else:
        a, b = (factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
        table, own = table + layer.scaling * (b @ a).T, a
    q = model.model.layers[0].self_attn.q_proj
    weights = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.layers.0.self_attn.q_proj.weight": q.weight + q.delta_weight().detach(),
    }
    by_hand = torch.func.functional_call(alone, weights, (), {"input_ids": IDS, "labels": IDS}, tie_weights=False)
    torch.testing.assert_close(out.logits, by_hand.logits, atol=1e-5, rtol=1e-5)
    by_hand.loss.backward()
    grad = layer.weight.grad if "modules_to_save" in case else layer.lora_A.grad
    torch.testing.assert_close(grad, own.grad, atol=1e-6, rtol=1e-4)

    if "modules_to_save" not in case:
        lit_peft.merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, out.logits, atol=1e-5, rtol=1e-5)
        lit_peft.unmerge_adapter(model)
    torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, out.logits)
    with lit_peft.disable_adapter(model):
        assert torch.equal(model(IDS).logits, before)
    merged = lit_peft.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(IDS).logits, out.logits, atol=1e-5, rtol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(IDS).logits, out.logits, atol=1e-5, rtol=1e-5)
    lit_peft.detach(model)
    assert torch.equal(model(IDS).logits, before) and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("case", [{"target_modules": ["wte"]}, {"modules_to_save": ["wte"]}], ids=str)
def test_gpt2_and_rows_of_tokens(case: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    base = copy.deepcopy(model)
    randomize(lit_peft.attach(model, LoRASettings(**settings({"target_modules": ["c_attn"], **case}))))
    expected = model(IDS).logits
    folder = lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(copy.deepcopy(base), folder)
    assert torch.equal(again(IDS).logits, expected)
    theirs = peft.PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lit_peft.merge(model)(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    lit_peft.attach(llama(), LoRASettings(trainable_token_indices=[1], ensure_weight_tying=True))


def test_names_that_peft_does_not_tie_are_written_in_our_own_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**shape, intermediate_size=16)).eval()
    base = copy.deepcopy(model)
    randomize(lit_peft.attach(model, LoRASettings(**settings({"target_modules": ["query", "word_embeddings"]}))))
    with pytest.raises(LitPeftError, match="ensure_weight_tying cannot be written in peft's format"):
        lit_peft.save_adapter(model, tmp_path / "peft", format="peft")
    again = lit_peft.load_adapter(base, lit_peft.save_adapter(model, tmp_path / "own"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_folder_with_two_updates_is_refused(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = randomize(lit_peft.attach(llama(), LoRASettings(**settings(CASES[0]))))
    folder = lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(LitPeftError, match=r"lm_head\.lora_A\.weight differs"):
        lit_peft.load_adapter(llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize(
    ("change", "tie", "why"),
    [
        ({}, False, "no head that shares"),
        ({"target_modules": ["q_proj"]}, True, "neither target_modules nor modules_to_save"),
        ({"use_dora": True}, True, "use_dora=True"),
        ({"lora_bias": True}, True, "lora_bias=True"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, True, "one list of token ids"),
    ],
)
def test_tying_that_has_no_effect_or_is_not_possible(change: dict[str, Any], tie: bool, why: str) -> None:
    with pytest.raises(LitPeftError, match=why):
        lit_peft.attach(llama(tie), LoRASettings(**{**settings(CASES[0]), **change, "rank_pattern": {}}))


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
def test_a_folder_where_tying_has_no_effect_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True)
    theirs = peft.get_peft_model(llama(False), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lit_peft.load_adapter(llama(False), tmp_path / "theirs")
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_ranks_and_scales_of_both_are_the_same(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings({**CASES[1], "alpha_pattern": {"lm_head": 2}})))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(LitPeftError, match="alpha_pattern gives"):
        lit_peft.load_adapter(llama(), tmp_path / "theirs")
    case = {**CASES[0], "rank_pattern": {"embed_tokens": 3}, "alpha_pattern": {"tokens": 2}}
    with pytest.raises(LitPeftError, match="alpha_pattern has 'tokens'"):
        lit_peft.attach(llama(), LoRASettings(**settings(case)))
    case["alpha_pattern"] = {"embed_tokens": 2, "lm_head": 3}
    with pytest.raises(LitPeftError, match=r"alpha_pattern gives .*'lm_head': 3"):
        lit_peft.attach(llama(), LoRASettings(**settings(case)))
    case["alpha_pattern"] = {"embed_tokens": 2}
    model = randomize(lit_peft.attach(llama(), LoRASettings(**settings(case))))
    again = peft.PeftModel.from_pretrained(llama(), lit_peft.save_adapter(model, tmp_path / "ours"))
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_adapter_is_not_added_to_others() -> None:
    model = llama()
    lit_peft.add_adapter(model, "tied", LoRASettings(**settings(CASES[0])))
    lit_peft.add_adapter(model, "other", LoRASettings())
    with pytest.raises(LitPeftError, match="ensure_weight_tying=True"):
        lit_peft.set_adapter(model, ["other", "tied"])
