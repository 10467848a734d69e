"""Quantized frozen bases: they compute what torchao and bitsandbytes compute, and every method trains on them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import lit_peft
from lit_peft import CausalLMData, LitPeftError
from lit_peft.cli import main
from lit_peft.models.precision_note import precision_note
from lit_peft.models.quantization import quantize
from lit_peft.nn import LoRALinear
from lit_peft.nn.quantized import (
    QuantizedLinear,
    dense_linear,
    dense_weight,
    is_quantized,
    pack_nibbles,
    unpack_nibbles,
)
from lit_peft.util.memory import page_out, process_memory

METHODS = ("LoRA", "IA3", "AdapterH", "AdapterP", "Parallel", "PTuning", "PTuningV2", "PrefixTuning", "PromptTuning")
needs = {
    "torchao": pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
    "bitsandbytes": pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
}
# How far the logits of a quantized base may be from its own, in units of their size.
CASES = [
    *(pytest.param("int4", 0.3, method, marks=needs["torchao"]) for method in METHODS),
    *(pytest.param("nf4", 0.3, method, marks=needs["bitsandbytes"]) for method in METHODS),
    *(pytest.param("int8", 0.02, method, marks=needs["torchao"]) for method in METHODS[:2]),
    *(pytest.param("llm-int8", 0.04, method, marks=needs["bitsandbytes"]) for method in METHODS[:2]),
]
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def base(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("base"), tokenizer_folder, 64, 128, 2)


def _save(folder: Path, tokenizer_folder: Path | None, width: int, inner: int, layers: int, heads: int = 4) -> Path:
    import shutil

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        eos_token_id=4,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tokenizer_folder.iterdir() if tokenizer_folder else ():
        shutil.copy(file, folder)
    return folder


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def train(module: Any, steps: int = 6) -> list[float]:
    module.configure_model()
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(steps):
        loss = module.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("width", [6, 7])
def test_nibbles_come_back(width: int) -> None:
    codes = torch.randint(-8, 8, (5, width), dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, (width + 1) // 2) and torch.equal(unpack_nibbles(packed, width), codes)


@needs["torchao"]
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 asymmetric"])
def test_the_layer_is_torchaos(kind: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    from lit_peft.models.quantization import _trainable_through

    linear = nn.Linear(64, 24)
    mapping = MappingType.ASYMMETRIC if "asym" in kind else MappingType.SYMMETRIC
    group = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=mapping)
    quantize_(linear, Int8WeightOnlyConfig() if kind == "int8" else group)
    layer = _trainable_through(linear)
    expected = linear.weight.dequantize()
    assert torch.equal(dense_weight(layer), expected)
    bytes_held = layer.weight.nbytes + layer.scale.nbytes
    assert bytes_held <= 64 * 24 * (1.1 if kind == "int8" else 0.7)
    # Not even a cast to half precision changes the weight.
    assert torch.equal(dense_weight(layer.to(torch.bfloat16)), expected)


@needs["torchao"]
def test_a_tensor_of_torchaos_is_dequantized_by_it() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(64, 24)
    quantize_(linear, Int8WeightOnlyConfig())
    expected = linear.weight.dequantize()
    assert torch.equal(dense_weight(linear), expected)
    assert torch.equal(dense_weight(linear, torch.bfloat16), expected.bfloat16())


@needs["bitsandbytes"]
def test_eight_bits_of_bitsandbytes_are_dequantized_as_it_does() -> None:
    """Before the first forward the weight holds codes and scales, after it the layer's state does."""
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    layer = Linear8bitLt(64, 24, has_fp16_weights=False)
    plain = layer.weight.detach().clone()
    layer.to("cpu")
    before = dense_weight(layer)
    layer(torch.randn(2, 64))
    codes, scale = layer.state.CB, layer.state.SCB
    for dense in (before, dense_weight(layer)):
        assert torch.allclose(dense, int8_vectorwise_dequant(codes, scale).float(), atol=1e-7)
        assert apart(dense, plain) < 0.01
    assert dense_weight(layer, torch.bfloat16).dtype == torch.bfloat16


def quantized_linear(bits: int, zero: bool = False) -> QuantizedLinear:
    torch.manual_seed(0)
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (24, 64), dtype=torch.int8)
    point = torch.randint(-3, 3, (24, 2), dtype=torch.int8) if zero else None
    return QuantizedLinear(codes, torch.rand(24, 2) * 0.1, point, nn.Parameter(torch.randn(24)), bits)


@pytest.mark.parametrize(("bits", "zero"), [(8, False), (4, True)])
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_gradient_are_those_of_the_dequantized_weight(bits: int, zero: bool, autocast: bool) -> None:
    layer = quantized_linear(bits, zero)
    wrapped = LoRALinear(quantized_linear(bits, zero), r=4)
    nn.init.normal_(wrapped.lora_B)
    plain = LoRALinear(nn.Linear(64, 24), r=4)
    plain.load_state_dict({name: value for name, value in wrapped.state_dict().items() if "base" not in name}, False)
    with torch.no_grad():
        plain.base_layer.weight.copy_(dense_weight(layer))
        plain.base_layer.bias.copy_(layer.bias)
    x = torch.randn(3, 5, 64, requires_grad=True)
    for module, reference in ((layer, plain.base_layer), (wrapped, plain)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs = [made(x) for made in (module, reference)]
        grads = [torch.autograd.grad(out.float().square().sum(), x)[0] for out in outs]
        tolerance = 2e-2 if autocast else 1e-5
        assert outs[0].dtype == outs[1].dtype and apart(outs[0].float(), outs[1].float()) < tolerance
        assert apart(*grads) < tolerance


def test_four_bits_of_an_odd_width() -> None:
    torch.manual_seed(0)
    codes, scale = torch.randint(-8, 8, (6, 7), dtype=torch.int8), torch.rand(6, 1)
    layer = LoRALinear(QuantizedLinear(codes, scale, None, None, 4), r=2)
    nn.init.normal_(layer.lora_B)
    dense = layer.dense_weight()
    assert torch.equal(dense, codes * scale)
    x = torch.randn(3, 7, requires_grad=True)
    expected = x @ (dense + layer.delta_weight()).T
    with torch.no_grad():
        assert apart(layer(x), expected) < 1e-5
    assert apart(layer.base_layer(x), x @ dense.T) < 1e-5
    out = layer(x)
    assert apart(out, expected) < 1e-5
    grads = [torch.autograd.grad(made.square().sum(), x)[0] for made in (out, expected)]
    assert apart(*grads) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_a_plain_layer_of_a_quantized_one(bits: int) -> None:
    layer = quantized_linear(bits)
    made = dense_linear(layer.eval(), torch.bfloat16)
    assert type(made) is nn.Linear and not made.training and not made.weight.requires_grad
    assert torch.equal(made.weight, dense_weight(layer).bfloat16()) and made.weight.dtype == torch.bfloat16
    assert made.bias is layer.bias and (made.in_features, made.out_features) == (64, 24)
    assert layer.dense_weight().dtype == torch.float32
    assert torch.equal(layer.dense_weight(torch.bfloat16), dense_weight(layer, torch.bfloat16))


def test_the_scale_follows_the_codes() -> None:
    moved = quantized_linear(8, zero=True).to("meta")
    assert moved.weight.is_meta and moved.scale.is_meta and moved.zero_point is not None and moved.zero_point.is_meta


def test_what_is_saved_of_a_quantized_layer_is_its_codes_alone() -> None:
    layer = quantized_linear(4, zero=True)
    assert set(layer.state_dict()) == {"weight", "bias"}
    eight = QuantizedLinear(torch.zeros(4, 6, dtype=torch.int8), torch.ones(4, 2), None, None)
    assert "bits=4, group_size=32" in repr(layer) and "bits=8, group_size=3" in repr(eight)


def test_nothing_dequantized_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    x = torch.randn(2, 64, requires_grad=True)
    for layer in (quantized_linear(8), LoRALinear(quantized_linear(4), r=2)):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x)
    assert kept and max(kept) < 24 * 64


# ------------------------------------------------------------------------------------------------ the methods


@pytest.mark.parametrize(("name", "distance", "method"), CASES)
def test_every_method_trains_and_its_adapter_fits_the_unquantized_base(
    name: str, distance: float, method: str, base: Path, tmp_path: Path
) -> None:
    module = getattr(lit_peft, method)(base=str(base), learning_rate=1e-2, quantization=name)
    module.configure_model()
    assert sum(is_quantized(layer) for layer in module.modules()) == 2 * 7
    frozen = {key: value.clone() for key, value in module.named_parameters() if not value.requires_grad}
    losses = train(module)
    assert losses[-1] < losses[0] - 0.01
    after = dict(module.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    module.save_adapter(tmp_path / "a")
    want = module.eval()(**batch()).logits[:, -7:]
    plain = lit_peft.load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a").eval()
    assert 0 < apart(plain(**batch()).logits[:, -7:], want) < distance
    # And onto a quantized base again: the very same.
    again = getattr(lit_peft, method)(base=str(base), quantization=name)
    again.configure_model()
    lit_peft.load_adapter(lit_peft.detach(again.model), tmp_path / "a")
    torch.testing.assert_close(again.eval()(**batch()).logits[:, -7:], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_merging_dequantizes_and_is_exact_to_rounding(name: str, use_dora: bool, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes" if name == "nf4" else "torchao")
    module = lit_peft.LoRA(base=str(base), learning_rate=1e-2, quantization=name, use_dora=use_dora)
    train(module)
    want = module.eval()(**batch()).logits
    with pytest.raises(LitPeftError, match=r"lit_peft\.merge"):
        module.merge()
    module.save_adapter(tmp_path / "a")
    merged = lit_peft.merge(module.model)
    assert not any(is_quantized(layer) for layer in merged.modules())
    assert {type(layer) for layer in merged.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
    assert apart(merged(**batch()).logits, want) < 2e-6
    merged.save_pretrained(tmp_path / "m")
    assert "quantization" not in (tmp_path / "m" / "config.json").read_text()
    options = ["--base", str(base), "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "by_command")]
    assert main(["merge", *options, "--quantization", name]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "by_command").eval()
    assert apart(ours(**batch()).logits, want) < 2e-6
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(alone(**batch()).logits, merged(**batch()).logits)


@needs["torchao"]
def test_detaching_leaves_the_quantized_base(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    quantize(model, "int4")
    want = model(**batch()).logits
    lit_peft.attach(model, lit_peft.LoRASettings())
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, LoRALinear)).lora_B.fill_(1)
    assert not torch.equal(model(**batch()).logits, want)
    assert torch.equal(lit_peft.detach(model)(**batch()).logits, want)


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "question_answering"])
def test_heads_are_trained_unquantized(name: str, task: str, encoder: Path, base: Path) -> None:
    pytest.importorskip("torchao" if name == "int8" else "bitsandbytes")
    for folder in (encoder, base):
        labels = {} if task == "question_answering" else {"num_labels": 2}
        module = lit_peft.LoRA(base=str(folder), task=task, quantization=name, **labels)
        module.configure_model()
        heads = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad]
        assert heads and any(is_quantized(layer) for layer in module.modules())


@needs["torchao"]
def test_a_resumed_run_equals_one_that_ran_through(base: Path, reviews: Path, tmp_path: Path) -> None:
    def fit(epochs: int, name: str, resume: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(0)
        data = CausalLMData(base=str(base), train=str(reviews), batch_size=16, limit_train=32)
        module = lit_peft.LoRA(base=str(base), quantization="int4", lr_scheduler="constant", warmup_steps=2)
        options = {"max_epochs": epochs, "enable_checkpointing": False, "default_root_dir": tmp_path, **QUIET}
        trainer = pl.Trainer(**options)
        trainer.fit(module, data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / name)
        return module.state_dict()

    whole = fit(2, "whole.ckpt")
    fit(1, "half.ckpt")
    resumed = fit(2, "resumed.ckpt", tmp_path / "half.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    again = lit_peft.LoRA.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert again.hparams.quantization == "int4" and any(is_quantized(layer) for layer in again.modules())


@needs["bitsandbytes"]
def test_a_config_of_transformers_is_taken_as_a_dictionary(base: Path) -> None:
    module = lit_peft.LoRA(base=str(base), quantization={"quant_method": "bitsandbytes", "load_in_4bit": True})
    module.configure_model()
    assert sum(is_quantized(layer) for layer in module.modules()) == 14


@needs["torchao"]
def test_torchaos_own_config_is_trained_through_as_well(base: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    quantize(model, {"quant_method": "torchao"})
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 14


def test_what_cannot_be_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LitPeftError, match="'int8'"):
        lit_peft.LoRA(base=str(base), quantization="int-8")
    with pytest.raises(LitPeftError, match="quant_method"):
        lit_peft.LoRA(base=str(base), quantization={"load_in_4bit": True})
    if find_spec("torchao"):
        with pytest.raises(LitPeftError, match="in full"):
            lit_peft.FullFineTuning(base=str(base), quantization="int8").configure_model()
        with pytest.raises(LitPeftError, match=r"q_proj.*quantized"):
            lit_peft.LoRA(base=str(base), quantization="int8", modules_to_save=["q_proj"]).configure_model()
        with pytest.raises(LitPeftError, match="floating point"):
            lit_peft.LoRA(base=str(base), quantization="int8", init_lora_weights="pissa").configure_model()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LitPeftError, match=r"lit-peft\[quantization\]"):
        lit_peft.LoRA(base=str(base), quantization="nf4")


# -------------------------------------------------------------------------------------------------- the memory

PEAK = """
import sys, torch, transformers
import lit_peft, torchao.quantization
from lit_peft.util.memory import peak_memory
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
module = lit_peft.LoRA(base=sys.argv[1], quantization=sys.argv[2] or None, target_modules="all-linear")
module.configure_model()
optimizer = module.configure_optimizers()
ids = torch.randint(5, 40, (1, 32))
for _ in range(1):
    loss = module.training_step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(peak_memory() / 2**20)
"""


@pytest.mark.heavy
@needs["torchao"]
def test_a_weight_that_two_layers_share_is_quantized_in_both(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    one, other = (layer.mlp for layer in model.model.layers)
    other.up_proj.weight = kept = one.up_proj.weight
    expected = kept.detach().clone()
    quantize(model, "int8")
    assert torch.equal(kept, expected), "the weight is as it was for everybody who still uses it"
    assert torch.equal(dense_weight(one.up_proj), dense_weight(other.up_proj))
    assert apart(dense_weight(one.up_proj), expected) < 0.01


def test_memory_of_a_mapped_tensor_is_freed_and_read_again(tmp_path: Path) -> None:
    values = torch.arange(2**20, dtype=torch.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    tensor = load_file(tmp_path / "a.safetensors")["a"]
    page_out(tensor)
    assert torch.equal(tensor, values)
    before = process_memory("RssFile")
    page_out(tensor)
    after = process_memory("RssFile")
    assert before is None or after is None or after < before - 3 * 2**20
    changed = tensor.add_(1)
    page_out(changed)
    assert torch.equal(changed, values + 1), "what was changed in memory alone is not lost"


@needs["torchao"]
def test_a_mixtures_experts_are_quantized_and_what_is_not_is_named() -> None:
    config = Qwen3MoeConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=4,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts_per_tok=2,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = sum(p.numel() for name, p in model.named_parameters() if "proj" not in name)
    quantize(model.requires_grad_(False), "int8")
    note = precision_note(model)
    assert note is not None and f"{1 - kept / total:.2%} of {total:,} frozen weights" in note
    assert f"embed_tokens ({40 * 32 / total:.2%})" in note and f"lm_head ({40 * 32 / total:.2%})" in note
    assert "gate (" in note and "experts" not in note


@needs["torchao"]
@pytest.mark.skipif(not process_memory("VmHWM"), reason="peak memory is read from /proc")
def test_peak_memory_is_below_the_fp32_runs(tmp_path: Path) -> None:
    folder = _save(tmp_path / "big", None, 1024, 2816, 5, 16)
    # What is freed goes back at once: the peak is of what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

    def peak_memory(name: str) -> float:
        command = [sys.executable, "-c", PEAK, str(folder), name]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        return float(re.findall(r"^[\d.]+$", done.stdout, flags=re.MULTILINE)[-1])

    fp32, int8, int4 = peak_memory(""), peak_memory("int8"), peak_memory("int4")
    print(f"peak memory, MB: fp32 {fp32:.0f}, int8 {int8:.0f}, int4 {int4:.0f}")
    assert int8 < fp32 - 50 and int4 < fp32 - 50
