"""Tiny random models of every architecture, and what tests do with them."""

from __future__ import annotations

import copy
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

# Reference cases that peft and AdapterHub wrote: all of them where they are there, else the three in this repository.
_CASES = (os.environ.get("LIT_PEFT_GOLDEN"), Path(__file__).parents[2] / "shared" / "golden")
GOLDEN = next((Path(path) for path in _CASES if path and Path(path).is_dir()), Path(__file__).with_name("golden"))

# Arguments of a Trainer that runs a test and writes nothing of its own accord.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}
# Each method with settings that fit a tiny model.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4},
    "IA3": {},
    "AdapterH": {"reduction_factor": 4},
    "AdapterP": {"reduction_factor": 4},
    "Parallel": {"reduction_factor": 4},
    "PrefixTuning": {"num_virtual_tokens": 4},
    "PTuningV2": {"num_virtual_tokens": 4},
    "PTuning": {"num_virtual_tokens": 4},
    "PromptTuning": {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"},
}
# By how much larger steps a method moves as far: the vectors of (IA)³ start at one, not near zero.
STEP = {"IA3": 8}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
GPT = {"n_layer": 2, "n_embd": 32, "n_head": 4}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {"num_layers": 2, "d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma": {**GROUPED, "head_dim": 16},
    "phi": SHAPE,
    "phi3": {**GROUPED, "pad_token_id": 0},
    "gpt2": GPT,
    "gpt_neox": SHAPE,
    "gpt_neox serial": {**SHAPE, "use_parallel_residual": False},
    "gptj": {**GPT, "rotary_dim": 4},
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt post-LN": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 4},
    "bloom normed": {
        "n_layer": 2,
        "hidden_size": 32,
        "n_head": 4,
        "apply_residual_connection_post_layernorm": True,
    },
    "falcon": SHAPE,
    "falcon new": {**GROUPED, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon serial": {**SHAPE, "parallel_attn": False, "alibi": True},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "distilbert": {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 48},
    "deberta-v2": {**SHAPE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "electra": {**SHAPE, "embedding_size": 16},
    "modernbert": {**SHAPE, "pad_token_id": 0},
}
SEQ2SEQS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": {**T5, "feed_forward_proj": "gated-gelu"},
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "marian": SEQ2SEQ,
}
ALL = {**DECODERS, **ENCODERS, **SEQ2SEQS}
# What peft calls their tasks.
PEFT_TASK = {
    **dict.fromkeys(DECODERS, "CAUSAL_LM"),
    **dict.fromkeys(ENCODERS, "SEQ_CLS"),
    **dict.fromkeys(SEQ2SEQS, "SEQ_2_SEQ_LM"),
}
AUTO = {
    **dict.fromkeys(DECODERS, transformers.AutoModelForCausalLM),
    **dict.fromkeys(ENCODERS, transformers.AutoModelForSequenceClassification),
    **dict.fromkeys(SEQ2SEQS, transformers.AutoModelForSeq2SeqLM),
}


@cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    settings = {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": None, **ALL[name]}
    config = transformers.AutoConfig.for_model(name.split()[0], **settings)
    model = AUTO[name].from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the start, where norms are ones and biases zeros.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make(name: str) -> Any:
    return copy.deepcopy(_made(name))


def batch(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (2, 7))
    mask = torch.ones_like(ids)
    if name in DECODERS:
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}
    labels = torch.tensor([0, 1]) if name in ENCODERS else torch.randint(3, 61, (2, 5))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scramble(model: nn.Module) -> None:
    """Move every trained parameter away from its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def checkpointing(model: nn.Module, on: bool) -> None:
    """Turn gradient checkpointing on or off, by its newer name where transformers has it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_{'enable' if on else 'disable'}")()


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance * expected.detach().abs().max().item(), rtol=0)


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def learns(model: Any, inputs: dict[str, torch.Tensor], rate: float, steps: int = 2) -> None:
    """A few steps move every trained parameter, and the loss falls."""
    trained = trained_of(model)
    optimizer = torch.optim.SGD(trained.values(), lr=rate)
    losses, moved = [], dict.fromkeys(trained, False)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in trained.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            moved[name] |= bool(parameter.grad.abs().max() > 0)
        optimizer.step()
    assert all(moved.values()), [name for name, seen in moved.items() if not seen]
    assert losses[-1] < losses[0]


def checkpointing_changes_nothing(model: Any, inputs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """Checkpointed layers run their hooks a second time, and the gradients are the same; in training mode, it stays."""
    trained, found = trained_of(model), []
    model.train()
    for on in (False, True):
        if on:
            checkpointing(model, True)
        model.zero_grad()
        torch.manual_seed(4)
        model(**inputs).loss.backward()
        found.append(
            {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
        )
    checkpointing(model, False)
    assert found[0].keys() == trained.keys()
    for name, gradient in found[0].items():
        close(found[1][name], gradient, tolerance)


def quiet_compiler(monkeypatch: Any) -> None:
    """Keep `torch.compile` from writing thousands of log records: pytest asks for every one."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
