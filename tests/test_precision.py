"""Every method in every precision of the Trainer's that a CPU can compute in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import QUIET
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lit_peft
from lit_peft import CausalLMData, LitPeftError, LoRASettings, TextClassificationData
from lit_peft.methods.adapter_dtype import set_adapter_dtype

METHODS = ("LoRA", "AdapterH", "AdapterP", "Parallel", "PTuning", "PTuningV2", "PrefixTuning", "PromptTuning")
OPTIONS: dict[str, Any] = {**QUIET, "enable_checkpointing": False, "limit_val_batches": 0}
# precision, adapter_dtype, what the base and the adapter are then kept in
PRECISIONS = [
    ("32-true", None, torch.float32, torch.float32),
    ("bf16-mixed", None, torch.float32, torch.float32),
    ("bf16-true", None, torch.bfloat16, torch.bfloat16),
    ("bf16-true", "float32", torch.bfloat16, torch.float32),
]


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(float(outputs["loss"]))


def fit(method: str, decoder: Path, reviews: Path, precision: Any, steps: int = 4, **settings: Any) -> tuple[Any, Any]:
    pl.seed_everything(0)
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=32)
    rate = {"learning_rate": 2e-2, "lr_scheduler": "constant", "warmup_steps": 0}
    module = getattr(lit_peft, method)(base=str(decoder), **rate, **settings)
    losses = Losses()
    pl.Trainer(max_steps=steps, precision=precision, callbacks=[losses], **OPTIONS).fit(module, data)
    return module, losses.values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("precision", "adapter_dtype", "frozen", "trained"), PRECISIONS)
def test_every_method_learns_and_keeps_its_types(
    precision: str,
    adapter_dtype: str | None,
    frozen: Any,
    trained: Any,
    method: str,
    decoder: Path,
    reviews: Path,
    tmp_path: Path,
) -> None:
    module, losses = fit(method, decoder, reviews, precision, adapter_dtype=adapter_dtype)
    assert losses[-1] < losses[0] - 0.02
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {frozen}
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {trained}
    module.save_adapter(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    stored = load_file(file)
    assert {value.dtype for value in stored.values()} == {trained}
    if method == "LoRA":
        batch = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
        want = module.eval()(**batch).logits.float()
        base = AutoModelForCausalLM.from_pretrained(decoder, dtype=frozen)
        merged = lit_peft.merge(lit_peft.load_adapter(base, tmp_path / "a")).eval()
        assert {p.dtype for p in merged.parameters()} == {frozen}
        tolerance = 1e-5 if frozen == torch.float32 else 3e-2
        assert (merged(**batch).logits.float() - want).norm() / want.norm() < tolerance


def test_16_mixed_on_a_cpu_is_lightnings_bf16_mixed(decoder: Path, reviews: Path) -> None:
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU"):
        module, losses = fit("LoRA", decoder, reviews, "16-mixed", steps=2)
    assert module.trainer.precision == "bf16-mixed" and losses[-1] < losses[0] + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_16_mixed(method: str, decoder: Path, reviews: Path) -> None:
    settings = {**OPTIONS, "accelerator": "gpu", "devices": 1}
    losses = Losses()
    module = getattr(lit_peft, method)(base=str(decoder), learning_rate=2e-2, lr_scheduler="constant")
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=32)
    pl.Trainer(max_steps=12, precision="16-mixed", callbacks=[losses], **settings).fit(module, data)
    assert losses.values[-1] < losses.values[0]


def test_master_weights_take_steps_that_bfloat16_loses(decoder: Path, reviews: Path) -> None:
    def moved(adapter_dtype: str | None) -> float:
        pl.seed_everything(0)
        data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=32)
        module = lit_peft.LoRA(
            base=str(decoder),
            adapter_dtype=adapter_dtype,
            optimizer="SGD",
            learning_rate=1e-4,
            lr_scheduler="constant",
            warmup_steps=0,
            init_lora_weights="gaussian",
        )
        trainer = pl.Trainer(max_steps=0, precision="bf16-true", **OPTIONS)
        trainer.fit(module, data)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.endswith("lora_B"):
                    p.fill_(1)
        before = {name: p.clone() for name, p in module.named_parameters() if name.endswith("lora_B")}
        trainer.fit_loop.epoch_loop.max_steps = 3
        trainer.fit(module, data)
        return max((module.get_parameter(name) - value).detach().abs().max().item() for name, value in before.items())

    assert moved(None) == 0 < moved("float32")


def test_a_trained_head_bias_and_norm_keep_master_weights(encoder: Path, reviews: Path) -> None:
    for method, settings in (("LoRA", {"bias": "all"}), ("AdapterH", {"train_layer_norms": True}), ("HeadOnly", {})):
        pl.seed_everything(0)
        data = TextClassificationData(base=str(encoder), train=str(reviews), batch_size=32)
        module = getattr(lit_peft, method)(
            base=str(encoder), task="sequence_classification", adapter_dtype="float32", learning_rate=1e-2, **settings
        )
        trainer = pl.Trainer(max_steps=3, precision="bf16-true", **OPTIONS)
        trainer.fit(module, data)
        trainer.validate(module, data, verbose=False)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        # A second cast does not round them: not every value is one of bfloat16.
        assert any(not torch.equal(p, p.bfloat16().float()) for p in trained.values())
        assert not any(name in vars(owner) for owner in module.modules() for name in owner._parameters)


def test_an_unknown_type_is_said(decoder: Path) -> None:
    with pytest.raises(LitPeftError, match="adapter_dtype='fp32'"):
        lit_peft.LoRA(base=str(decoder), adapter_dtype="fp32")


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_that_fails_leaves_the_master_weights_in_place(bias: bool) -> None:
    class Head(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 2:
                raise RuntimeError("too many")
            return super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Head(4, 2, bias=bias)).bfloat16()
    lit_peft.attach(model, LoRASettings(target_modules=["0"], modules_to_save=["1"]))
    set_adapter_dtype(model, torch.float32)
    with pytest.raises(RuntimeError, match="too many"):
        model(torch.ones(3, 4, dtype=torch.bfloat16))
    assert model[1].weight.dtype == torch.float32 and not set(vars(model[1])) & {"weight", "bias"}
    assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
