"""Several active LoRAs, and merged ones, with what else may be done to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import quiet_compiler
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import LitPeftError, LoRASettings

IDS = torch.arange(12).view(2, 6)


def with_two(**settings: Any) -> Any:
    """A model with the active LoRAs `a` and `b`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    for name in "ab":
        lit_peft.add_adapter(model, name, LoRASettings(r=2, target_modules=["q_proj", "embed_tokens"], **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
    return lit_peft.set_adapter(model, ["a", "b"])


def test_dropout_leaves_token_ids_alone() -> None:
    model = with_two(lora_dropout=0.5)
    embeddings = model.get_input_embeddings()
    expected = embeddings(IDS)
    torch.testing.assert_close(embeddings.train()(IDS), expected)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("several", [("a", "b"), ["a", "b"]])
def test_a_row_has_one_adapter(several: Any) -> None:
    model = with_two()
    with pytest.raises(LitPeftError, match=r"not \W'a', 'b'\W"), lit_peft.row_adapters(model, [several, "a"]):
        pass


def test_save_pretrained_writes_no_model_that_nobody_can_load(tmp_path: Path) -> None:
    model = with_two()
    with pytest.raises(LitPeftError, match="several adapters are active"):
        model.save_pretrained(tmp_path / "both")
    lit_peft.merge(model).save_pretrained(tmp_path / "merged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["a", None])
def test_the_scale_of_a_merged_adapter_does_not_change(name: str | None) -> None:
    model = lit_peft.merge_adapter(with_two())
    with pytest.raises(LitPeftError, match="merged"):
        lit_peft.set_scale(model, 0.5, name)
    lit_peft.set_scale(lit_peft.unmerge_adapter(model), 0.5, name)


def test_an_error_in_the_block_of_a_merged_adapter_is_the_one_that_is_seen() -> None:
    model = with_two()
    with lit_peft.disable_adapter(model):
        base = model(IDS).logits
    with pytest.raises(ValueError, match="of the block"), lit_peft.merged_adapter(model):
        lit_peft.detach(model)
        raise ValueError("of the block")
    assert torch.equal(model(IDS).logits, base)


def test_a_whole_model_with_invocation_tokens_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_compiler(monkeypatch)
    model = lit_peft.set_adapter(with_two(), None)
    lit_peft.add_adapter(model, "c", LoRASettings(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    compiled = torch.compile(model, backend="eager")
    for ids in (IDS, IDS.flip(1)):
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    torch._dynamo.reset()
