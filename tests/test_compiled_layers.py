"""Layers compiled one by one: the same gradients, few compilations, no graph break, and a way back."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import QUIET, batch, checkpointing, make, scramble, trained_of
from test_changes import SETTINGS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.nn.torch_internals import is_compiled
from lit_peft.training import compile_setting

QUICK = [("LoRA", "llama"), ("LoRA", "t5"), ("AdapterH", "llama"), ("PrefixTuning", "llama")]


@pytest.fixture(autouse=True)
def new_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest asks for every log record, and the compiler writes thousands.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def attached(settings: Any, architecture: str = "llama") -> Any:
    torch.manual_seed(0)
    model = lit_peft.attach(make(architecture), settings)
    scramble(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients of a training step in one row, with the loss."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**inputs).loss
    loss.backward()
    found = [parameter.grad.flatten() for parameter in trained_of(model).values() if parameter.grad is not None]
    return torch.cat([loss.detach()[None], *found])


def batches(architecture: str) -> list[dict[str, torch.Tensor]]:
    """Batches of three sizes: other numbers of rows, and of tokens."""
    # Not 2 rows: sizes that are equal in the first batch, here to the number of heads, count as the same size.
    first = {name: torch.cat([value, value[:1]]) for name, value in batch(architecture).items()}
    more_rows = {name: torch.cat([value, value]) for name, value in first.items()}
    longer = {name: torch.cat([value, value[:, :3]], 1) if value.dim() == 2 else value for name, value in first.items()}
    return [first, more_rows, longer]


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        pytest.param(method, architecture, marks=() if (method, architecture) in QUICK else pytest.mark.heavy)
        for method in SETTINGS
        for architecture in ("llama", "t5")
        if architecture == "llama" or method in ("LoRA", "PrefixTuning")
    ],
)
def test_layers_are_traced_whole_and_once(method: str, architecture: str) -> None:
    """The gradients are those of eager layers, for every size of batch."""
    check(attached(SETTINGS[method], architecture), architecture, "eager")


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["LoRA", "AdapterH"])
def test_inductor_compiles_the_same_gradients(method: str) -> None:
    check(attached(SETTINGS[method]), "llama", "inductor")


def check(model: Any, architecture: str, backend: str) -> None:
    eager = [gradients(model, inputs) for inputs in batches(architecture)]
    counting = CompileCounterWithBackend(backend)
    num_layers = lit_peft.compile_layers(model, backend=counting)
    compiled = [gradients(model, inputs) for inputs in batches(architecture)]
    assert num_layers == (4 if architecture == "t5" else 2)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert not counters["graph_break"]
    # The first layer's input may need no gradient; batches of other sizes compile nothing. An encoder and a decoder
    # have different layers.
    # With inductor, the backend is called for backward passes as well.
    assert 0 < counting.frame_count <= num_layers or backend != "eager"


def test_dropout_and_checkpointing_are_compiled_too() -> None:
    model = attached(LoRASettings(r=4, target_modules="all-linear", lora_dropout=0.3))
    plain = gradients(model, batch("llama"))
    checkpointing(model, True)
    lit_peft.compile_layers(model, backend="aot_eager")
    torch.testing.assert_close(gradients(model, batch("llama")), plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0 and not counters["graph_break"]


def test_evaluation_and_generation_compile_nothing() -> None:
    model = attached(LoRASettings(r=4))
    lit_peft.compile_layers(model, backend="eager")
    ids = batch("llama")["input_ids"]
    model.eval()
    model(input_ids=ids, labels=ids).loss.backward()
    model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert not counters["frames"]


@pytest.mark.parametrize("method", ["LoRA", "AdapterH", "PrefixTuning"])
def test_an_adapter_may_change_after_compilation(method: str) -> None:
    """Compiled code of an adapter's hooks must not run when they are gone."""
    model = attached(SETTINGS[method])
    base = make("llama").train()
    ids = batch("llama")["input_ids"]
    lit_peft.compile_layers(model, backend="eager")
    adapted = model(input_ids=ids).logits
    with lit_peft.disable_adapter(model):
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=0, atol=1e-5)
    lit_peft.add_adapter(model, "other", SETTINGS[method])
    lit_peft.set_adapter(model, "other")
    scramble(model)
    changed = model(input_ids=ids).logits
    assert not torch.allclose(changed, adapted, atol=1e-3)
    lit_peft.restore_layers(model)
    torch.testing.assert_close(model(input_ids=ids).logits, changed, rtol=0, atol=1e-5)


def test_a_copy_of_a_compiled_model_is_not_compiled() -> None:
    model = attached(LoRASettings(r=4))
    lit_peft.compile_layers(model, backend="eager")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(is_compiled(module) for module in twin.modules())
        torch.testing.assert_close(gradients(twin, batch("llama")), gradients(model, batch("llama")))


def test_a_model_without_known_layers_is_refused() -> None:
    with pytest.raises(LitPeftError, match="no transformer layers of a known structure"):
        lit_peft.compile_layers(nn.Sequential(nn.Linear(2, 2)))


# --------------------------------------------------------------------------------------------------- the setting


def fit(base: Path, reviews: Path, **settings: Any) -> lit_peft.LoRA:
    data = lit_peft.TextClassificationData(base=str(base), train=str(reviews), batch_size=4, max_length=12)
    module = lit_peft.LoRA(base=str(base), task="sequence_classification", num_labels=2, r=2, **settings)
    pl.seed_everything(0)
    pl.Trainer(max_steps=3, limit_val_batches=1, enable_checkpointing=False, **QUIET).fit(module, data)
    return module


def weights(module: Any) -> torch.Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values()])


def test_layers_are_not_compiled_on_a_cpu_unless_asked(encoder: Path, reviews: Path) -> None:
    module = fit(encoder, reviews)
    assert module.hparams.compile == "auto"
    assert not any(is_compiled(layer) for layer in module.modules()) and not counters["frames"]


def no_compiler(*_: Any) -> Any:
    raise FileNotFoundError("there is no C++ compiler")


def test_a_compiler_that_fails_is_one_warning_and_the_same_run(
    encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fit(encoder, reviews, compile=False)
    monkeypatch.setattr(compile_setting, "compile_layers", partial(lit_peft.compile_layers, backend=no_compiler))
    with pytest.warns(UserWarning, match="could not be compiled .*no C.. compiler.* so training goes on"):
        module = fit(encoder, reviews, compile=True)
    assert not any(is_compiled(layer) for layer in module.modules())
    assert torch.equal(weights(module), weights(plain))


@pytest.mark.heavy
def test_a_run_with_compiled_layers_trains_the_same_weights(
    encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor would draw other numbers for the dropout of the base.
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)
    compiled, plain = (fit(encoder, reviews, compile=on) for on in (True, False))
    assert counters["frames"]["total"] and any(is_compiled(layer) for layer in compiled.modules())
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-3, atol=1e-5)


def test_other_values_of_compile_are_refused(encoder: Path) -> None:
    with pytest.raises(LitPeftError, match="compile"):
        lit_peft.LoRA(base=str(encoder), compile="always")  # type: ignore[arg-type]
