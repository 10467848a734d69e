"""Virtual tokens on decoders of many kinds: padding, windows, recurrence and caches change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import scramble

import lit_peft
from lit_peft import LitPeftError, PromptTuningSettings, PTuningSettings

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
# Kinds that padding between the virtual tokens and the text would change: windows, distances, recurrence.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": SLIDING,
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 128},
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "falcon_h1": {"mamba_d_ssm": 32, **MAMBA},
}
PROMPT = PromptTuningSettings(num_virtual_tokens=5, prompt_tuning_init="RANDOM")


def build(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **KINDS.get(kind, {}), **more})
    model = lit_peft.attach(transformers.AutoModelForCausalLM.from_config(config), PROMPT).eval()
    scramble(model)
    return model


def padded(ids: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(len(ids), count, dtype=torch.long)
    return {"input_ids": torch.cat([zeros, ids], 1), "attention_mask": torch.cat([zeros, torch.ones_like(ids)], 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind: str) -> None:
    model = build(kind)
    ids = torch.randint(3, 61, (2, 8))
    with torch.no_grad():
        plain, shifted = model(**padded(ids, 0)).logits, model(**padded(ids, 24)).logits[:, 24:]
    torch.testing.assert_close(shifted, plain, atol=1e-5, rtol=0)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(**padded(ids, count), **settings)[:, count:] for count in (0, 24)]
    assert torch.equal(written[0], written[1])
    assert torch.equal(model.generate(**padded(ids, 24), **settings, use_cache=False)[:, 24:], written[0])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_5_text"])
def test_a_next_turn_goes_on_from_the_cache_of_the_last(kind: str) -> None:
    model, ids = build(kind), torch.randint(3, 61, (2, 6))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first = model.generate(**padded(ids, 0), **settings, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.randint(3, 61, (2, 7))], 1)
    name = "cache" if "cache" in first else "past_key_values"
    continued = model.generate(**padded(turn, 0), **settings, **{name: first[name]})
    assert torch.equal(continued, model.generate(**padded(turn, 0), **settings))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mamba", {"state_size": 8}),
        ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8}),
        ("llama4_text", {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}),
    ],
)
def test_decoders_without_a_usual_inside_train_and_write(kind: str, more: dict[str, Any]) -> None:
    model, ids = build(kind, **more), torch.randint(3, 61, (2, 9))
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits.shape[:2] == ids.shape
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(**padded(ids, 0), **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("settings", [PROMPT, PTuningSettings(num_virtual_tokens=4)])
def test_a_config_may_name_several_end_tokens(settings: Any) -> None:
    config = transformers.AutoConfig.for_model("llama", **{**SHAPE, "eos_token_id": [1, 2, 3]})
    model = lit_peft.attach(transformers.AutoModelForCausalLM.from_config(config), settings)
    assert model(torch.randint(4, 61, (1, 5))).logits.shape == (1, 5, 61)


def test_a_model_that_hears_has_no_place_for_virtual_tokens() -> None:
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 32, "encoder_ffn_dim": 32}
    config = transformers.WhisperConfig(
        **shape, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=61, pad_token_id=0
    )
    with pytest.raises(LitPeftError, match=r"WhisperForCond\w+ has no plain table of token embeddings .* LoRASettings"):
        lit_peft.attach(transformers.WhisperForConditionalGeneration(config), PROMPT)
