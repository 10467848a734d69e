"""What `lit_peft/models/transformers_internals.py` takes from inside of transformers is still there."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from models import DECODERS, ENCODERS, SEQ2SEQS, SHAPE, make
from torch import nn

from lit_peft.models.transformers_internals import (
    AttentionConfig,
    alibi_function,
    attention_implementation,
    clear_quantization_flags,
    computes_next_token_loss,
    eager_attention,
    has_model_class,
    is_model_of,
    no_split_classes,
    own_loss_function,
    returns_its_product,
    set_own_loss_function,
    supports_flash_attention,
    uses_attention_interface,
    warns_without_mask,
)


def test_auto_classes_say_which_configs_they_have_a_model_for() -> None:
    llama, t5, bert = transformers.LlamaConfig(), transformers.T5Config(), transformers.BertConfig()
    assert has_model_class("AutoModelForCausalLM", llama) and not has_model_class("AutoModelForCausalLM", t5)
    assert has_model_class("AutoModelForSeq2SeqLM", t5) and not has_model_class("AutoModelForMaskedLM", llama)
    assert has_model_class("AutoModelForMultipleChoice", bert)
    assert not has_model_class("AutoModelForCausalLM", None)


def test_models_that_look_for_padding_without_a_mask() -> None:
    assert warns_without_mask(make("gpt2")) and not warns_without_mask(make("llama"))


def test_models_that_flash_attention_can_run() -> None:
    assert supports_flash_attention(make("llama")) and not supports_flash_attention(make("bloom"))
    assert not supports_flash_attention(nn.Linear(2, 2))


def test_auto_classes_say_which_models_are_theirs() -> None:
    classifier, decoder = make("bert"), make("llama")
    assert is_model_of("AutoModelForSequenceClassification", classifier)
    assert not is_model_of("AutoModelForSequenceClassification", decoder)
    assert is_model_of("AutoModelForCausalLM", decoder)
    assert not is_model_of("AutoModelForCausalLM", nn.Linear(2, 2))


def test_the_attention_of_a_model_is_read_from_its_config() -> None:
    model = make("llama")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert attention_implementation(model.config) == name
    assert attention_implementation(None) is None


def test_a_stand_in_config_changes_one_attention_and_follows_the_config() -> None:
    calls = []

    def attend(module: nn.Module, *args: object, **kwargs: object) -> object:
        calls.append(module.layer_idx)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(module, *args, **kwargs)

    transformers.AttentionInterface.register("lit_peft_test", attend)
    model = make("llama")
    ids = torch.arange(3, 9)[None]
    before = model(input_ids=ids).logits
    attention = model.model.layers[1].self_attn
    attention.config = AttentionConfig(attention.config, "lit_peft_test")
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert calls == [1]
    model.config.new_setting = 5
    assert attention.config.new_setting == 5 and attention_implementation(model.config) == "sdpa"
    for other in (copy.deepcopy(attention.config), pickle.loads(pickle.dumps(attention.config))):
        assert attention_implementation(other) == "lit_peft_test" and other.hidden_size == 32


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *SEQ2SEQS])
def test_attentions_look_up_their_function_or_have_code_of_their_own(name: str) -> None:
    own_code = {"bloom", "falcon", "deberta"}
    model = make(name)
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    looks_up = [uses_attention_interface(module) for module in attentions]
    assert any(looks_up) is (name.split()[0].split("-")[0] not in own_code)
    for module in (module for module, found in zip(attentions, looks_up, strict=True) if found):
        assert callable(eager_attention(module))
    assert eager_attention(nn.Linear(2, 2)) is None


def test_models_with_alibi_build_it_by_a_function_of_their_file() -> None:
    mask = torch.ones(1, 3, dtype=torch.long)
    for name in ("bloom", "falcon serial"):
        function = alibi_function(make(name))
        assert function is not None
        steps = function(mask, 2, torch.float32).reshape(2, 3)
        torch.testing.assert_close(steps[:, 2] - steps[:, 1], steps[:, 1] - steps[:, 0])
    assert alibi_function(make("llama")) is None


def test_linear_layers_that_return_more_than_their_product_are_known() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    config = transformers.Llama4TextConfig(hidden_size=16, num_local_experts=4, num_experts_per_tok=1)
    router = Llama4Router(config).train()
    assert not returns_its_product(router) and router.training
    assert returns_its_product(FalconLinear(4, 3)) and returns_its_product(nn.Linear(4, 3))


def test_models_name_the_layers_that_stay_whole() -> None:
    model = make("llama")
    assert no_split_classes(model) == {type(model.model.layers[0])}
    assert no_split_classes(nn.Linear(2, 2)) == set()


def test_models_with_the_next_token_loss_are_known() -> None:
    assert computes_next_token_loss(make("llama")) and computes_next_token_loss(make("gpt2"))
    assert not computes_next_token_loss(make("t5"))
    assert not computes_next_token_loss(make("bert"))
    assert not computes_next_token_loss(nn.Linear(2, 2))


def test_a_loss_function_is_set_and_taken_back() -> None:
    model = make("llama")
    original, attributes = model.loss_function, set(vars(model))
    assert own_loss_function(model) is None
    set_own_loss_function(model, max)
    assert own_loss_function(model) is max and model.loss_function is max
    set_own_loss_function(model, None)
    assert model.loss_function is original and set(vars(model)) == attributes
    set_own_loss_function(model, None)


def test_a_model_without_its_quantization_flags_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=61, **SHAPE)
    model = transformers.LlamaForCausalLM(config)
    model.is_quantized = model.is_loaded_in_8bit = True
    model.quantization_method = "bitsandbytes"
    config.quantization_config, config._is_quantized = {"quant_method": "bitsandbytes", "load_in_8bit": True}, True
    clear_quantization_flags(model)
    clear_quantization_flags(nn.Linear(2, 2))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False) and type(again.lm_head) is nn.Linear
