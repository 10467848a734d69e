"""The frozen layers' states, kept: the same losses, fewer layers run, nothing kept that would be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit_peft.callbacks import ActivationCache
from models import DECODERS, ENCODERS, QUIET, batch, make
from torch import Tensor, nn

import lit_peft
from lit_peft.models.architectures import layer_stacks
from lit_peft.util.errors import LitPeftError

OPTIONS: dict[str, Any] = {**QUIET, "enable_checkpointing": False}
TRAINER: Any = SimpleNamespace(global_rank=0, precision="32-true")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    words = "a bad film good great is it of poor the this was well weak wonderful".split()  # noqa: SIM905
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": " ".join(words[n : n + 2 + n % 5])}) for n in range(10)))
    return file


class Watch(pl.Callback):
    """Notes the losses, and how often each layer really runs."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.runs = [0, 0]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number, layer in enumerate(layer_stacks(pl_module)[0]):
            layer.module.mlp.register_forward_hook(lambda mlp, *_, number=number: self._count(mlp, number))

    def _count(self, mlp: nn.Module, number: int) -> None:
        self.runs[number] += mlp.training

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(decoder: Path, texts: Path, *callbacks: pl.Callback, epochs: int = 3, **settings: Any) -> Watch:
    pl.seed_everything(0, verbose=False)
    watch = Watch()
    data = lit_peft.CausalLMData(base=str(decoder), train=str(texts), batch_size=3)
    module = lit_peft.LoRA(base=str(decoder), r=4, learning_rate=0.05, **{"layers_to_transform": [1], **settings})
    pl.Trainer(max_epochs=epochs, callbacks=[*callbacks, watch], **OPTIONS).fit(module, data)
    assert all("forward" not in vars(layer.module) for layer in layer_stacks(module)[0])
    return watch


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_the_same_losses_and_the_layers_below_run_in_the_first_epoch_alone(
    decoder: Path, texts: Path, tmp_path: Path, on_disk: bool
) -> None:
    folder = str(tmp_path / "cache") if on_disk else None
    plain, cache = fit(decoder, texts), ActivationCache(folder)
    cached = fit(decoder, texts, cache)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5) and plain.losses[-1] < plain.losses[0]
    steps = len(plain.losses)
    assert plain.runs == [steps, steps] and cached.runs == [steps // 3, steps]
    assert cache.hits == 2 * cache.misses > 0
    again = fit(decoder, texts, ActivationCache(folder))
    assert again.losses == pytest.approx(plain.losses, rel=1e-5)
    assert again.runs[0] == (0 if on_disk else steps // 3)


def test_the_folder_is_keyed_on_the_base_and_outlives_a_crash(decoder: Path, texts: Path, tmp_path: Path) -> None:
    fit(decoder, texts, ActivationCache(str(tmp_path / "cache")), epochs=1)
    (folder,) = (tmp_path / "cache").iterdir()
    index = folder / "rows-0.index"
    index.write_bytes(index.read_bytes()[:-30])
    half = ActivationCache(str(tmp_path / "cache"))
    plain = fit(decoder, texts, half, epochs=2)
    assert 0 < half.misses < half.hits
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(decoder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for file in decoder.glob("token*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    cache = ActivationCache(str(tmp_path / "cache"))
    assert fit(tmp_path / "other", texts, cache, epochs=1).losses != plain.losses[:4]
    assert cache.hits == 0 and len(list((tmp_path / "cache").iterdir())) == 2


def test_full(decoder: Path, texts: Path) -> None:
    plain, cache = fit(decoder, texts), ActivationCache(max_gb=1e-6)
    with pytest.warns(UserWarning, match="full"):
        cached = fit(decoder, texts, cache)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert 0 < len(cache._store._rows) < 10


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_architecture(name: str) -> None:
    model = make(name)
    for module in model.modules():
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    lit_peft.attach(model, lit_peft.LoRASettings(r=2, target_modules="all-linear", layers_to_transform=[1]))
    model.train()
    rows = batch(name)
    expected = model(**rows).loss
    cache = ActivationCache()
    cache.on_fit_start(TRAINER, model)
    first, second = model(**rows).loss, model(**rows).loss
    assert (cache.misses, cache.hits) == (2, 2)
    # The same tokens with another padding, and the rows in another order.
    padded = {key: value.flip(0) for key, value in rows.items()}
    wider = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    for key, value in wider.items():
        if padded[key].dim() == 2:
            padded[key] = torch.cat([padded[key], padded[key].new_full((2, 2), value)], 1)
    third = model(**padded).loss
    assert cache.hits == 4
    for loss in (first, second, third):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    second.backward()
    cache.teardown()
    assert torch.equal(model(**rows).loss, expected)


def test_evaluation_and_generation_pass_by() -> None:
    model = lit_peft.attach(make("llama"), lit_peft.LoRASettings(layers_to_transform=[1])).eval()
    rows = batch("llama")
    expected, tokens = model(**rows).loss, model.generate(rows["input_ids"], max_new_tokens=3, do_sample=False)
    cache = ActivationCache()
    cache.on_fit_start(TRAINER, model)
    assert torch.equal(model(**rows).loss, expected)
    assert torch.equal(model.generate(rows["input_ids"], max_new_tokens=3, do_sample=False), tokens)
    assert cache.hits == cache.misses == 0


def test_a_head_alone_runs_no_layer_from_the_second_time_on() -> None:
    model = make("llama").train().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    rows = batch("llama")
    cache = ActivationCache()
    cache.on_fit_start(TRAINER, model)
    ran: list[Tensor] = []
    for layer in layer_stacks(model)[0]:
        layer.module.mlp.register_forward_hook(lambda *_: ran.append(_[2]))
    first = model(**rows).loss
    assert len(ran) == 2
    assert torch.equal(model(**rows).loss, first) and len(ran) == 2


def test_rows_are_told_apart_by_positions_and_batches_by_form() -> None:
    model = lit_peft.attach(make("llama"), lit_peft.LoRASettings(layers_to_transform=[1])).train()
    rows = batch("llama")
    cache = ActivationCache()
    cache.on_fit_start(TRAINER, model)
    model(**rows)
    moved = model(**rows, position_ids=torch.arange(7).flip(0).expand(2, 7)).loss
    cache.teardown()
    assert cache.hits == 0 and cache.misses == 4
    assert torch.equal(moved, model(**rows, position_ids=torch.arange(7).flip(0).expand(2, 7)).loss)
    cache.on_fit_start(TRAINER, model)
    whole = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.warns(UserWarning, match="computed in full"):
        model(input_ids=rows["input_ids"], attention_mask=whole)


def test_what_would_be_wrong_is_refused() -> None:
    upper = lit_peft.LoRASettings(layers_to_transform=[1])
    with pytest.raises(LitPeftError, match="layers_to_transform"):
        ActivationCache().on_fit_start(TRAINER, lit_peft.attach(make("llama"), lit_peft.LoRASettings()))
    with pytest.raises(LitPeftError, match="one stack"):
        ActivationCache().on_fit_start(TRAINER, lit_peft.attach(make("t5"), lit_peft.LoRASettings()))
    for name in ("bert", "gpt2"):
        with pytest.raises(LitPeftError, match=r"drop.*=0\.1"):
            ActivationCache().on_fit_start(TRAINER, lit_peft.attach(make(name), upper))
    model = make("llama")
    model.model.layers[0].self_attn.attention_dropout = 0.2
    with pytest.raises(LitPeftError, match=r"attention_dropout=0\.2"):
        ActivationCache().on_fit_start(TRAINER, lit_peft.attach(model, upper))
    prompted = lit_peft.attach(make("llama"), lit_peft.PromptTuningSettings(num_virtual_tokens=2)).train()
    cache = ActivationCache()
    cache.on_fit_start(TRAINER, prompted)
    with pytest.raises(LitPeftError, match="below the lowest"):
        prompted(**batch("llama"))
