"""Every method in every precision of the Trainer's that a CPU can compute in."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit_peft.callbacks import AdapterEMA
from models import QUIET, STEP, scramble
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lit_peft
from lit_peft import CausalLMData, LitPeftError, LoRASettings, TextClassificationData
from lit_peft.methods.adapter_dtype import set_trained_dtype
from lit_peft.methods.attachment import attachment_of
from lit_peft.tasks import find_task

METHODS = ("LoRA", "IA3", "AdapterH", "AdapterP", "Parallel", "PTuning", "PTuningV2", "PrefixTuning", "PromptTuning")
OPTIONS: dict[str, Any] = {**QUIET, "enable_checkpointing": False, "limit_val_batches": 0}
# precision, adapter_dtype, what the base and the adapter are then kept in
PRECISIONS = [
    ("32-true", None, torch.float32, torch.float32),
    ("bf16-mixed", None, torch.float32, torch.float32),
    ("bf16-true", None, torch.bfloat16, torch.float32),
    ("bf16-true", "bfloat16", torch.bfloat16, torch.bfloat16),
]


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(float(outputs["loss"]))


def fit(method: str, decoder: Path, reviews: Path, precision: Any, steps: int = 4, **settings: Any) -> tuple[Any, Any]:
    pl.seed_everything(0)
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=32)
    rate = {"learning_rate": 2e-2 * STEP.get(method, 1), "lr_scheduler": "constant", "warmup_steps": 0}
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

    assert moved("bfloat16") == 0 < moved(None) == moved("float32")


def test_a_trained_head_bias_and_norm_keep_master_weights(encoder: Path, reviews: Path) -> None:
    for method, settings in (("LoRA", {"bias": "all"}), ("AdapterH", {"train_layer_norms": True}), ("HeadOnly", {})):
        pl.seed_everything(0)
        data = TextClassificationData(base=str(encoder), train=str(reviews), batch_size=32)
        module = getattr(lit_peft, method)(
            base=str(encoder), task="sequence_classification", learning_rate=1e-2, **settings
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
    set_trained_dtype(attachment_of(model), torch.float32)
    with pytest.raises(RuntimeError, match="too many"):
        model(torch.ones(3, 4, dtype=torch.bfloat16))
    assert model[1].weight.dtype == torch.float32 and not set(vars(model[1])) & {"weight", "bias"}
    assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------- metrics

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TASKS: dict[str, dict[str, Any]] = {
    "causal_lm": {**INPUTS, "labels": IDS},
    "sequence_classification": {**INPUTS, "labels": torch.tensor([0, 1])},
    "token_classification": {**INPUTS, "labels": IDS % 2},
    "multiple_choice": {**INPUTS, "choices": torch.tensor([1, 1]), "labels": torch.tensor([0, 0])},
    "question_answering": {**INPUTS, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])},
}
BATCHES = 300  # bfloat16 counts to 256


def constant_model(task: str, base: Path, **settings: Any) -> Any:
    """A module whose answers are the same in every precision: its head gives zeros."""
    labels = {"labels": ["O", "B-X"]} if task.endswith("classification") else {}
    module = lit_peft.HeadOnly(base=str(base), task=task, **labels, **settings)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    return module


@cache
def metrics_in(precision: Any, task: str, base: Path) -> dict[str, float]:
    loader = DataLoader([TASKS[task]] * BATCHES, batch_size=None)
    trainer = pl.Trainer(precision=precision, **OPTIONS)
    return dict(trainer.test(constant_model(task, base), loader, verbose=False)[0])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_the_same_in_every_precision(task: str, precision: str, decoder: Path, encoder: Path) -> None:
    base = decoder if task == "causal_lm" else encoder
    expected, found = metrics_in("32-true", task, base), metrics_in(precision, task, base)
    assert found.keys() == expected.keys() and "test_loss" in found
    assert found == {name: pytest.approx(value, rel=1e-3) for name, value in expected.items()}
    if task == "causal_lm":
        assert found["test_perplexity"] == pytest.approx(40, rel=1e-3)  # every token of the vocabulary is as likely
    elif task == "sequence_classification":
        assert found["test_accuracy"] == 0.5 and found["test_loss"] == pytest.approx(math.log(2), rel=1e-3)


def test_correlations_do_not_round_values_in_half_precision() -> None:
    with torch.device("cpu"):
        metrics = find_task("sequence_classification").metrics(SimpleNamespace(num_labels=1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        for metric in metrics.values():
            metric.to("cpu")  # as Lightning does before each update
        output = SimpleNamespace(
            logits=torch.tensor([[257.0], [258.0], [259.0]], dtype=torch.float32), loss=torch.ones(())
        )
        find_task("sequence_classification").update(metrics, output, {"labels": torch.tensor([1, 3, 2])})
        assert float(metrics["spearman"].compute()) == pytest.approx(0.5)
        assert float(metrics["pearson"].compute()) == pytest.approx(0.5)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_states_of_metrics_are_wide_in_fitting(precision: Any, encoder: Path) -> None:
    seen: set[torch.dtype] = set()

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            states = (state for metric in module.val_metrics.values() for state in metric.metric_state.values())
            flat = (t for state in states for t in (state if isinstance(state, list) else [state]))
            seen.update(tensor.dtype for tensor in flat)

    batches = DataLoader([TASKS["sequence_classification"]] * BATCHES, batch_size=None)
    module = constant_model("sequence_classification", encoder, learning_rate=1e-300)
    options = {**OPTIONS, "limit_val_batches": None, "limit_train_batches": 1}
    trainer = pl.Trainer(max_epochs=1, precision=precision, callbacks=[Look()], **options)
    trainer.fit(module, batches, batches)
    assert seen <= {torch.float32, torch.int64} and torch.int64 in seen
    assert float(trainer.callback_metrics["val_accuracy"]) == 0.5
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(math.log(2), rel=1e-3)


# ------------------------------------------------------------------------------- other state in half precision


def test_rotary_frequencies_are_not_rounded(decoder: Path) -> None:
    inputs = torch.randint(5, 40, (1, 1500), generator=torch.Generator().manual_seed(0))
    found = []

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            found.append(dict(module.model.named_buffers()))

    for settings in ({}, {"dtype": "float32"}):  # the base in bfloat16 from the start, or cast by the Trainer
        module = lit_peft.LoRA(base=str(decoder), **settings)
        trainer = pl.Trainer(precision="bf16-true", callbacks=[Look()], **{**OPTIONS, "limit_val_batches": None})
        trainer.validate(module, DataLoader([{"input_ids": inputs, "labels": inputs}], batch_size=None), verbose=False)
    own = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.bfloat16)
    expected = dict(own.named_buffers())
    assert expected and len(found) == 2
    for buffers in found:
        for name, value in expected.items():
            assert buffers[name].dtype == value.dtype and torch.equal(buffers[name], value)


def test_an_average_in_half_precision_moves(decoder: Path, reviews: Path) -> None:
    class Reference(pl.Callback):
        average: torch.Tensor

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            value = module.model.lm_head.weight.detach().double()
            self.average = value.clone() if trainer.global_step == 1 else 0.999 * self.average + 0.001 * value

    reference, average = Reference(), AdapterEMA(0.999, warmup=False, start_step=1)
    pl.seed_everything(0)
    module = lit_peft.FullFineTuning(base=str(decoder), learning_rate=1e-2)
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=32)
    callbacks = [reference, average]
    pl.Trainer(max_steps=6, precision="bf16-true", callbacks=callbacks, **OPTIONS).fit(module, data)
    assert module.model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(module.model.lm_head.weight.detach().double(), reference.average, rtol=5e-3, atol=1e-3)
    kept = average._average["model.lm_head.weight"]
    torch.testing.assert_close(kept.double(), reference.average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attach_trains_in_float32(dtype: torch.dtype, decoder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(decoder, dtype=dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    batch = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
    plain = base(**batch).logits
    model = lit_peft.attach(base, LoRASettings(bias="all", modules_to_save=["lm_head", "norm"], use_dora=True))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    out = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(out.logits, plain, rtol=2e-2, atol=2e-2)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)  # lost in half precision
    lit_peft.save_adapter(model, tmp_path / "a")
    again = lit_peft.load_adapter(AutoModelForCausalLM.from_pretrained(decoder, dtype=dtype), tmp_path / "a")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and again.lm_head.weight.dtype == torch.float32
    lit_peft.detach(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == dtype for name, value in before.items())


def test_rows_of_adapters_with_trained_heads_share_a_half_precision_batch(decoder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.bfloat16).eval()
    batch = {"input_ids": torch.tensor([[7, 8, 9, 10], [5, 6, 7, 8]])}
    expected = []
    for row, name in enumerate("ab"):
        lit_peft.add_adapter(model, name, LoRASettings(modules_to_save=["lm_head"]))
        scramble(model)
        expected.append(model(**batch).logits[row])
    with lit_peft.row_adapters(model, ["a", "b"]), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, torch.stack(expected), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["HeadOnly", "LoRA"])
def test_a_base_that_the_trainer_casts_is_of_one_type_without_its_adapter(
    method: str, encoder: Path, reviews: Path
) -> None:
    settings = {"bias": "all"} if method == "LoRA" else {}
    module = getattr(lit_peft, method)(
        base=str(encoder), task="sequence_classification", dtype="float32", learning_rate=1e-2, **settings
    )
    data = TextClassificationData(base=str(encoder), train=str(reviews), batch_size=32)
    pl.Trainer(max_steps=2, precision="bf16-true", **OPTIONS).fit(module, data)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    lit_peft.detach(module.model)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module(input_ids=torch.tensor([[7, 8, 9]])).logits.dtype == torch.bfloat16
