"""AdapterH, AdapterP and Parallel: AdapterHub's reference cases, every architecture, published counts, folders."""

from __future__ import annotations

import copy
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lit_peft
from lit_peft import AdapterHSettings, AdapterPSettings, LitPeftError, ParallelSettings
from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.nn.bottleneck import Bottleneck

GOLDEN = Path(os.environ.get("LIT_PEFT_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
METHODS = {"adapter_h": AdapterHSettings, "adapter_p": AdapterPSettings, "parallel": ParallelSettings}
CASES = sorted(
    path.parent
    for path in (GOLDEN / "adapters").glob("*/case.json")
    if json.loads(path.read_text())["method"] in METHODS
)

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
AUTO = {
    **dict.fromkeys(DECODERS, transformers.AutoModelForCausalLM),
    **dict.fromkeys(ENCODERS, transformers.AutoModelForSequenceClassification),
    **dict.fromkeys(SEQ2SEQS, transformers.AutoModelForSeq2SeqLM),
}


@lru_cache(maxsize=None)
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


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.skipif(not CASES, reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_reference_case(case: Path, tmp_path: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    io = load_file(case / "io.safetensors")
    inputs = {name: io[name] for name in io if not name.startswith("output")}

    def base() -> Any:
        return getattr(transformers, facts["auto_class"]).from_pretrained(case / "base").eval()

    model = lit_peft.load_adapter(base(), case / "adapter").eval()
    assert lit_peft.trainable_parameters(model) == facts["trainable"]
    with torch.no_grad():
        close(model(**inputs)[facts["output"]], io["output"])
        # The names and settings we write are AdapterHub's own.
        lit_peft.save_adapter(model, tmp_path / "again", format="adapterhub", name="ref")
        theirs = torch.load(case / "adapter" / "pytorch_adapter.bin", weights_only=True)
        ours = load_file(tmp_path / "again" / "adapter.safetensors")
        assert {n: tuple(t.shape) for n, t in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
        config, wanted = (
            json.loads((folder / "adapter_config.json").read_text())["config"]
            for folder in (tmp_path / "again", case / "adapter")
        )
        assert {name: wanted[name] for name in config} == config
        close(lit_peft.detach(model)(**inputs)[facts["output"]], io["output_base"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALL)
def test_every_architecture(name: str, method: str) -> None:
    model, inputs = make(name), batch(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        base = model(**inputs).logits
    extra = {"cross_adapter": True} if name in SEQ2SEQS else {}
    extra.update(mh_adapter=method != "adapter_p")
    lit_peft.attach(model, METHODS[method](bottleneck_size=4, non_linearity="gelu", **extra))
    with torch.no_grad():
        close(model(**inputs).logits, base, 1e-6)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * (2 if name not in SEQ2SEQS else 4) * (1 + extra["mh_adapter"]) + 8 * (len(extra) - 1)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model.train()
    losses, seen = [], dict.fromkeys(trained, False)
    for _ in range(2):
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss.detach()))
        for key, parameter in trained.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            seen[key] |= bool(parameter.grad.abs().max() > 0)
        optimizer.step()
    assert all(seen.values()), [key for key, ok in seen.items() if not ok]
    assert losses[1] < losses[0]
    # Checkpointed layers run their hooks a second time; the gradients are the same.
    scramble(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer.zero_grad()
        torch.manual_seed(4)
        model(**inputs).loss.backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in trained.items()})
    for key, gradient in gradients[0].items():
        close(gradients[1][key], gradient, 1e-4)
    with torch.no_grad():
        assert (model.eval()(**inputs).logits - base).abs().max() > 1e-3
    lit_peft.detach(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)
