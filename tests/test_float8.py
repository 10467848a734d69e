"""Frozen linear layers in e4m3: the numbers of torch's own product in 8 bits, gradients, and whole runs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from test_quantized import QUIET, apart, base, batch  # noqa: F401
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lit_peft
from lit_peft import LitPeftError
from lit_peft.models.loading import BaseSettings, load_base, load_config
from lit_peft.nn.float8 import E4M3, Float8Linear, to_float8
from lit_peft.nn.lora import LoRALinear
from lit_peft.nn.quantized import dense_linear, is_quantized
from lit_peft.nn.torch_internals import scaled_product


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Float8Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(32, 48, dtype=dtype)
    return linear, Float8Linear(linear.weight, linear.bias), torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)


def test_a_number_is_rounded_to_its_four_leading_bits() -> None:
    x = torch.randn(6, 40) * torch.logspace(-6, 6, 6)[:, None]
    codes, scale = to_float8(x)
    assert codes.dtype == E4M3 and scale.shape == (6, 1) and torch.finfo(E4M3).max == 448
    largest = x.abs().amax(1, keepdim=True)
    # Numbers much smaller than the largest of their row have fewer bits.
    assert ((codes.float() * scale - x).abs() <= x.abs() / 16 + largest / 448 / 1024).all()
    assert (codes.float().abs().amax(1) == 448).all()
    zeros, scale = to_float8(torch.zeros(2, 3))
    assert torch.equal(zeros.float() * scale, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_torchs_product(dtype: torch.dtype) -> None:
    """`torch._scaled_mm`, which runs on a CPU too, is what a GPU computes with."""
    linear, layer, x = made(dtype)
    rows = x.detach().reshape(-1, 32)
    codes, scale = to_float8(linear.weight.detach())
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted = scaled_product(to_float8(rows)[0], codes.t(), to_float8(rows)[1], scale.t()) + linear.bias
    scaled = grad.reshape(-1, 48) * scale.t().to(dtype)
    columns = codes.t().contiguous()
    wanted_grad = scaled_product(to_float8(scaled)[0], columns.t(), to_float8(scaled)[1], torch.ones(1, 32))
    assert apart(out.reshape(-1, 48).float(), wanted.float()) < 0.01
    assert x.grad is not None and apart(x.grad.reshape(-1, 32).float(), wanted_grad.float()) < 0.01
    assert out.dtype == x.grad.dtype == dtype


def test_it_is_close_to_the_layer_it_was() -> None:
    linear, layer, x = made()
    assert 0 < apart(layer(x), linear(x)) < 0.05
    (mine,) = torch.autograd.grad(layer(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(linear(x).square().sum(), x)
    assert 0 < apart(mine, theirs) < 0.08
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert apart(dense_linear(layer, torch.float32).weight, linear.weight) < 0.04


def test_codes_survive_casts_and_need_no_gradient() -> None:
    _, layer, x = made()
    before = layer(x)
    layer.bfloat16().float()
    assert apart(layer(x), before) < 0.01 and is_quantized(layer)  # the bias was rounded
    assert layer.weight.dtype == layer.columns.dtype == torch.uint8 and not layer.weight.requires_grad
    assert "e4m3" in repr(layer) and not any("columns" in name for name in layer.state_dict())


def test_lora_on_it_is_the_plain_formula() -> None:
    _, layer, x = made()
    lora = LoRALinear(layer, r=4, lora_alpha=8)
    nn.init.normal_(lora.lora_B)
    wanted = layer(x) + 2 * F.linear(F.linear(x, lora.lora_A), lora.lora_B)
    torch.testing.assert_close(lora(x), wanted, rtol=0, atol=1e-5)
    lora(x).sum().backward()
    assert lora.lora_A.grad is not None and lora.lora_A.grad.abs().max() > 0


def test_it_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest asks for every log record, and the compiler writes thousands.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    # Dynamo warns about what it does itself with every autograd function.
    warn = warnings.warn
    monkeypatch.setattr(
        warnings, "warn", lambda message, *rest, **more: "instantiated" in str(message) or warn(message, *rest, **more)
    )
    _, layer, x = made()
    lora = LoRALinear(layer, r=4)
    nn.init.normal_(lora.lora_B)
    lora = nn.Sequential(lora, Float8Linear(torch.randn(32, 48), None), lora)  # several in one graph
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lora, backend=counter, fullgraph=True, dynamic=True)
    for rows in (x, torch.randn(3, 7, 32, requires_grad=True)):
        mine = torch.autograd.grad(compiled(rows).square().sum(), [rows, *lora[0].parameters(recurse=False)])
        theirs = torch.autograd.grad(lora(rows).square().sum(), [rows, *lora[0].parameters(recurse=False)])
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def load(base: Path, quantization: str | None) -> Any:  # noqa: F811
    import transformers

    settings = BaseSettings(str(base), quantization=quantization)
    return load_base(settings, load_config(settings), transformers.AutoModelForCausalLM, torch.float32)[0]


def test_a_model_with_it(base: Path) -> None:  # noqa: F811
    plain, model = load(base, None), load(base, "fp8")
    layers = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert len(layers) == 14 and "lm_head" not in layers
    assert 0 < apart(model(**batch()).logits, plain(**batch()).logits) < 0.1
    lit_peft.attach(model, lit_peft.LoRASettings(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    adapted = model(**batch()).logits
    merged = lit_peft.merge(model)
    assert not any(isinstance(module, Float8Linear) for module in merged.modules())
    # The merged model multiplies without rounding the activations.
    assert apart(merged(**batch()).logits, adapted) < 0.1


@pytest.mark.parametrize("method", ["LoRA", "AdapterP", "PrefixTuning"])
def test_losses_are_near_those_of_the_unquantized_base(base: Path, method: str) -> None:  # noqa: F811
    losses = []
    for quantization in (None, "fp8"):
        pl.seed_everything(0)
        settings: dict[str, Any] = {"learning_rate": 5e-3, "lr_scheduler": "constant", "warmup_steps": 0}
        module = getattr(lit_peft, method)(base=str(base), quantization=quantization, **settings)
        seen = []

        class Record(pl.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, out: Any, inputs: Any, index: int) -> None:
                seen.append(float(out["loss"]))  # noqa: B023

        loader = torch.utils.data.DataLoader([batch()] * 20, batch_size=None)
        trainer = pl.Trainer(max_steps=20, callbacks=[Record()], enable_checkpointing=False, **QUIET)
        says = (
            contextlib.nullcontext() if quantization is None else pytest.warns(UserWarning, match="slower than no qu")
        )
        with says:
            trainer.fit(module, train_dataloaders=loader)
        losses.append(seen)
    plain, quantized = (torch.tensor(each) for each in losses)
    assert quantized[-1] < quantized[0] - 0.05, quantized
    assert ((quantized - plain).abs() / plain).max() < 0.02


def test_models_without_linear_layers_are_refused() -> None:
    from models import make

    from lit_peft.models.quantization import quantize

    with pytest.raises(LitPeftError, match="quantization='fp8': GPT2LMHeadModel has no linear layers"):
        quantize(make("gpt2"), "fp8", skip=("lm_head",))
