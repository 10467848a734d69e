"""Experts in 8 and 4 bits: their numbers beside bitsandbytes' and torchao's, outputs and gradients of every family."""

from __future__ import annotations

import copy
import io
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from lit_peft.callbacks import PrecisionReport
from models import QUIET
from safetensors.torch import load_file
from test_expert_lora import FAMILIES, IDS, fit, gradients, logits, mixture, moe, only_experts, scramble
from torch import Tensor, nn

import lit_peft
from lit_peft import LitPeftError
from lit_peft.cli import main
from lit_peft.methods.baselines import FullFineTuningSettings
from lit_peft.models.experts import (
    dequantize_experts,
    experts_left_out,
    quantize_experts,
    quantized_experts,
    stacked_experts,
)
from lit_peft.models.quantization import quantize
from lit_peft.nn.expert_codes import KINDS
from lit_peft.nn.quantized_experts import QuantizedStack

# DBRX has its experts in one matrix.
STACKED = [kind for kind in FAMILIES if kind != "dbrx"]


def quantized(kind: str, quantization: str = "int8", **settings: Any) -> tuple[Any, Any]:
    """A model with quantized experts, and the same one with the numbers that these stand for."""
    model = moe(kind, **settings)
    quantize_experts(model, quantization)
    plain = copy.deepcopy(model)
    dequantize_experts(plain, torch.float32)
    return model, plain


def stack(kind: str, is_transposed: bool = False) -> tuple[Tensor, QuantizedStack]:
    weight = torch.randn(4, 48, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    return weight, QuantizedStack(weight, kind, is_transposed)


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_tables_give_bitsandbytes_numbers(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, found = stack(kind)
    for expert in range(4):
        codes, state = functional.quantize_4bit(weight[expert], blocksize=64, quant_type=kind)
        assert torch.equal(found.dense(expert), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_are_as_good_as_torchaos(kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    weight, found = stack(kind)
    for expert in range(4):
        layer = nn.Linear(64, 48, bias=False)
        layer.weight.data = weight[expert].clone()
        int8, int4 = torchao.Int8WeightOnlyConfig, torchao.IntxWeightOnlyConfig
        torchao.quantize_(
            layer,
            int8(set_inductor_config=False)
            if kind == "int8"
            else int4(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)),
        )
        weights: Any = layer.weight
        theirs = weights.dequantize()
        step = weight[expert].abs().amax() / (127.5 if kind == "int8" else 7.5)
        # The same steps; a number halfway between two may be rounded to either.
        assert (found.dense(expert) - theirs).abs().max() <= step * 1.001
        assert ((found.dense(expert) - theirs).abs() > 1e-6).float().mean() < 0.01


def test_eight_bit_floats_are_the_nearest_of_e4m3() -> None:
    weight, found = stack("fp8")
    scale = weight.abs().amax(2, keepdim=True) / 448
    expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(found.dense_stack(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("kind", "bits", "error"), [
    ("int8", 8.7, 0.007), ("fp8", 8.7, 0.03), ("int4", 5.1, 0.11), ("nf4", 4.6, 0.1), ("nf4-dq", 4.2, 0.1),
    ("fp4", 4.6, 0.13), ("fp4-dq", 4.2, 0.13),
])  # fmt: skip
def test_size_and_error_of_each_kind(kind: str, bits: float, error: float, is_transposed: bool) -> None:
    weight, found = stack(kind, is_transposed)
    size = sum(tensor.nbytes for tensor in (*found.parameters(), *found.buffers()))
    assert 8 * size / weight.numel() < bits
    assert (found.dense_stack() - weight).norm() / weight.norm() < error
    assert found.shape == weight.shape and found.dense_stack().shape == weight.shape


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_no_block_divides(kind: str) -> None:
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = QuantizedStack(weight, kind)
    assert (found.dense_stack() - weight).norm() / weight.norm() < 0.2
    assert torch.equal(found.dense_stack()[2], found.dense(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    weight, _ = stack("int8")
    found = QuantizedStack(weight.to(dtype), "nf4")
    dense = found.dense_stack()
    assert dense.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    x, tall = torch.randn(9, 64, generator=generator).to(dtype), torch.randn(4, 5, 64, generator=generator).to(dtype)
    ends, ids = torch.tensor([2, 2, 7, 8], dtype=torch.int32), torch.tensor([3, 0, 0, 1, 3, 2, 2, 2, 1])
    products = {
        "linear": lambda w: F.linear(x, w[2]),
        "matmul": lambda w: x @ w[1].T,
        "transposed": lambda w: torch.matmul(x, w[1].transpose(0, 1)),
        "bmm": lambda w: torch.bmm(tall, w.transpose(-2, -1)),
        "first": lambda w: torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1),
        "one row": lambda w: F.linear(x[0], w[3]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, product in products.items():
            torch.testing.assert_close(product(found), product(dense), msg=name)
        grouped = F.grouped_mm(x, found.transpose(-2, -1), offs=ends)
    bounds = [0, *ends.tolist()]
    parts = [x[a:b] @ dense[e].T for e, (a, b) in enumerate(itertools.pairwise(bounds))]
    torch.testing.assert_close(grouped, torch.cat([*parts, x.new_zeros(1, 48)]))


def test_gradients_pass_and_nothing_dequantized_is_kept() -> None:
    _, found = stack("int4")
    x = torch.randn(6, 64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = F.linear(x, found[1])
    (out * torch.arange(48)).sum().backward()
    other = x.detach().requires_grad_()
    (F.linear(other, found.dense(1)) * torch.arange(48)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert max(kept, default=0) <= x.numel()


def test_other_uses_get_the_dequantized_weight_and_a_warning() -> None:
    _, found = stack("int8")
    with pytest.warns(UserWarning, match="another way than in products"):
        assert torch.equal(torch.einsum("eoi->e", found), torch.einsum("eoi->e", found.dense_stack()))
    with pytest.warns(UserWarning, match="another way than in products"):
        assert torch.equal(torch.ones(1) + found, found.dense_stack() + 1)


def test_only_the_experts_with_rows_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized("qwen3_moe", num_experts=8, num_experts_per_tok=1)
    used: list[tuple[int, int]] = []
    dense = QuantizedStack.dense

    def note(self: QuantizedStack, expert: int) -> Tensor:
        used.append((id(self), expert))
        return dense(self, expert)

    monkeypatch.setattr(QuantizedStack, "dense", note)
    with torch.no_grad():
        model(input_ids=IDS[:1, :2])
    # Two tokens go to at most two experts in each layer.
    for one in quantized_experts(model).values():
        assert 1 <= len([expert for owner, expert in used if owner == id(one)]) <= 2


# -------------------------------------------------------------------------------------------------- models and LoRA


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", STACKED)
def test_outputs_and_gradients_of_lora_equal_those_on_the_dequantized_model(kind: str, implementation: str) -> None:
    model, plain = quantized(kind, "nf4")
    assert quantized_experts(model) and not stacked_experts(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another way than in products.*")
        for one in (model, plain):
            if kind not in ("llama4_text", "jetmoe"):  # they have one implementation
                one.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)
        for one in (model, plain):
            lit_peft.attach(one, only_experts())
            scramble(one)
            one(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys() and len(found) >= 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_merging_dequantizes_and_detaching_leaves_the_codes(kind: str, tmp_path: Path) -> None:
    model, _ = quantized(kind, "int8")
    before, base = logits(model), {name: value.clone() for name, value in model.named_parameters()}
    lit_peft.attach(model, only_experts())
    scramble(model)
    trained = logits(model)
    assert not torch.allclose(before, trained)
    with pytest.raises(LitPeftError, match=r"quantized.*use lit_peft\.merge\(model\)"):
        lit_peft.merge_adapter(model)
    merged = lit_peft.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    assert not quantized_experts(merged) and not any(p.dtype == torch.int8 for p in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)
    lit_peft.detach(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, base[name]) for name, value in model.named_parameters())


def test_folders_fit_quantized_and_unquantized_bases_and_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, plain = quantized("mixtral", "int8")
    lit_peft.attach(model, only_experts())
    scramble(model)
    trained = logits(model)
    lit_peft.save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(lit_peft.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")), trained)
    again, _ = quantized("mixtral", "int8")
    assert torch.equal(logits(lit_peft.load_adapter(again, tmp_path / "adapter")), trained)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), trained, rtol=1e-4, atol=1e-5)


def test_copies_casts_and_pickles_keep_the_numbers() -> None:
    model, _ = quantized("mixtral", "nf4-dq")
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(logits(torch.load(stream, weights_only=False)), before)
    dense = {name: one.dense_stack() for name, one in quantized_experts(model).items()}
    half = model.to(torch.bfloat16)
    for name, one in quantized_experts(half).items():
        assert torch.equal(one.dense_stack(), dense[name].to(torch.bfloat16))
    assert torch.isfinite(logits(half)).all()


def test_bfloat16_and_autocast_compute_in_half() -> None:
    model, plain = quantized("qwen3_moe", "int8")
    for one in (model, plain):
        lit_peft.attach(one, only_experts())
        scramble(one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model), logits(plain), rtol=0.02, atol=0.02)
    for one in (model, plain):
        one.to(torch.bfloat16)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model, _ = quantized("qwen3_moe", "nf4")
        lit_peft.attach(model, only_experts())
        scramble(model)
        if checkpointing:
            model.train().activation_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(gradients(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_setting_quantizes_layers_and_experts_and_says_what_is_left(quantization: str) -> None:
    pytest.importorskip("torchao")
    model = moe("mixtral")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not quantized.*")
        quantize(model, quantization)
    assert len(quantized_experts(model)) == 4 and experts_left_out(model, of_quantized=False) is None
    # They still have no adapters.
    assert "are experts that are stored as one parameter" in str(experts_left_out(model))
    lit_peft.attach(model, only_experts())
    assert experts_left_out(model) is None
    with pytest.warns(UserWarning, match="experts.*not quantized"):
        quantize(moe("dbrx"), quantization)


def test_full_fine_tuning_of_quantized_experts_is_refused() -> None:
    model, _ = quantized("mixtral")
    with pytest.raises(LitPeftError, match="A quantized base cannot be trained in full"):
        lit_peft.attach(model, FullFineTuningSettings())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_compiled_layer_runs(with_lora: bool, implementation: str) -> None:
    model, _ = quantized("qwen3_moe", "int8")
    model.set_experts_implementation(implementation)
    if with_lora:
        lit_peft.attach(model, only_experts())
        scramble(model)
    expected = logits(model)
    model.model.layers[1].mlp.compile(backend="eager")
    torch.testing.assert_close(logits(model), expected)


def test_the_report_of_precision_counts_the_codes(tokenizer_folder: Path, tmp_path: Path, reviews: Path) -> None:
    base = mixture(tokenizer_folder, tmp_path / "base")
    found = {}
    for quantization in (None, "nf4"):
        report = PrecisionReport()
        module = lit_peft.LoRA(base=str(base), target_modules=[], target_experts=True, r=2, quantization=quantization)
        rows = lit_peft.CausalLMData(base=str(base), train=str(reviews), limit_train=16)
        trainer = pl.Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[report], limit_val_batches=0)
        trainer.fit(module, rows)
        found[quantization] = report.report["base"]
    # Experts, at 4.5 bits each: half of a byte for a number, and 4 bytes for 64.
    experts = 2 * 4 * 32 * (32 + 16)
    assert found["nf4"]["uint8"] >= experts / 2
    assert found[None]["float32"] - found["nf4"]["float32"] >= 4 * experts
    assert found["nf4"]["int32"] >= experts / 16


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_commands_train_and_merge_a_quantized_mixture(
    quantization: str,
    tokenizer_folder: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchao" if quantization == "int8" else "bitsandbytes")
    base = mixture(tokenizer_folder, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not quantized|another way than in products).*")
        assert main(fit(base, reviews, tmp_path / "run", "--model.quantization", quantization)) == 0
    shown = capsys.readouterr().out
    assert "frozen weights; in full precision: embed_tokens (" in shown and "lm_head" in shown
    (folder,) = (tmp_path / "run").glob("*/adapter")
    (checkpoint,) = (tmp_path / "run").glob("*/checkpoints/best*")
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "exported")]) == 0
    module = lit_peft.LoRA.load_from_checkpoint(checkpoint).eval()
    expected = logits_of(module.model)
    for adapter in (folder, tmp_path / "exported"):
        output = tmp_path / f"merged-{adapter.name}"
        given = ["--base", str(base), "--quantization", quantization, "--adapter", str(adapter)]
        assert main(["merge", *given, "--output", str(output)]) == 0
        merged = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
        torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS % 40).logits
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_on_quantized_experts_as_one_does(
    strategy: str, tokenizer_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    base, quantization = mixture(tokenizer_folder, tmp_path / "base"), ["--model.quantization", "int8"]
    assert main(fit(base, reviews, tmp_path / "one", "--data.batch_size", "16", *quantization)) == 0
    file = Path(__file__).parents[1] / "configs" / "strategies" / f"{strategy}.yaml"
    more = ["--config", str(file), "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--data.batch_size", "8"]
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom lit_peft.cli import main\nassert main(sys.argv[1:]) == 0\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += fit(base, reviews, tmp_path / "two", *more, *quantization)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = (
        load_file(next((tmp_path / name).glob("*/adapter")) / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-5)
