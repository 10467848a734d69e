"""The supervised-only loss against the model's own: loss and gradients, on every architecture and kind of head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DECODERS, GROUPED, SHAPE, checkpointing, scramble
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lit_peft
from lit_peft import AdapterHSettings, AdapterPSettings, LoRASettings, ParallelSettings, supervised_loss
from lit_peft.methods.attachment import MethodSettings
from lit_peft.tasks import supervised_ffn
from lit_peft.tasks import supervised_loss as wiring

FINISHED: dict[str, dict[str, Any]] = {
    "gemma2": {**GROUPED, "head_dim": 8, "final_logit_softcapping": 5.0},
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "granite": {**GROUPED, "logits_scaling": 8.0},
    "mixtral": {**GROUPED, "num_local_experts": 2, "output_router_logits": True},
    "llama tied": {**GROUPED, "tie_word_embeddings": True},
    "bert": {**SHAPE, "is_decoder": True},
}
MODELS = {**DECODERS, **FINISHED}


def build(name: str = "llama", vocabulary: int = 97) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], vocab_size=vocabulary, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(supervised: float = 0.5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 97, (3, 11), generator=generator)
    labels = torch.where(torch.rand(3, 11, generator=generator) < supervised, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted(name: str, settings: MethodSettings | None = None) -> Any:
    model = lit_peft.attach(build(name), settings or LoRASettings(r=4, target_modules="all-linear")).eval()
    scramble(model)
    return model


def assert_equal_to_plain(model: nn.Module, inputs: dict[str, Any], calls: int = 2) -> None:
    plain = copy.deepcopy(model)
    reference = plain(**inputs)
    reference.loss.backward()
    for _ in range(calls):
        model.zero_grad()
        with supervised_loss(model):
            output = model(**inputs)
        assert output.logits is None and "logits" not in output
        torch.testing.assert_close(output.loss, reference.loss, rtol=1e-5, atol=0, equal_nan=True)
        output.loss.backward()
        # One scale for all: some gradients, a key bias's for one, are zero but for rounding.
        scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
        for (path, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), path
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(model(**inputs).logits, reference.logits)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_loss(name: str) -> None:
    model = adapted(name)
    assert_equal_to_plain(model, batch())
    assert wiring._FINISHES[model] is not None


def test_the_finish_is_found_or_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("gemma2", "cohere", "granite", "llama"):
        model = adapted(name)
        with supervised_loss(model):
            model(**batch())
        found[name] = wiring._FINISHES[model]
    assert found == {"gemma2": (1.0, 5.0), "cohere": (0.25, None), "granite": (0.125, None), "llama": (1.0, None)}
    model = adapted("gemma2")
    monkeypatch.setattr(wiring, "_find_finish", lambda *_: None)
    assert_equal_to_plain(model, batch())
    assert wiring._FINISHES[model] is None


@pytest.mark.parametrize(
    "settings",
    [
        LoRASettings(target_modules=["q_proj", "lm_head"]),
        LoRASettings(modules_to_save=["lm_head"]),
        LoRASettings(target_modules=["embed_tokens"], modules_to_save=["norm"]),
    ],
    ids=["LoRA on the head", "trained head", "embeddings"],
)
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_trained_heads(settings: LoRASettings, name: str) -> None:
    assert_equal_to_plain(adapted(name, settings), batch())


def test_full_fine_tuning() -> None:
    assert_equal_to_plain(build("llama tied").eval(), batch())


def test_num_items_shift_labels_and_labels_at_the_ends() -> None:
    inputs = batch()
    assert_equal_to_plain(adapted("llama"), {**inputs, "num_items_in_batch": torch.tensor(40)})
    assert_equal_to_plain(adapted("llama"), {**inputs, "num_items_in_batch": 7})
    assert_equal_to_plain(adapted("llama"), {**inputs, "shift_labels": inputs["labels"].flip(1)})
    assert_equal_to_plain(adapted("llama"), batch(supervised=2.0))


def test_nothing_supervised_is_no_loss() -> None:
    model = adapted("llama")
    for _ in range(2):
        with supervised_loss(model):
            loss = model(**batch(supervised=-1.0)).loss
        loss.backward()
        assert float(loss.detach()) == 0 and not any(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert_equal_to_plain(adapted("llama"), {**batch(supervised=-1.0), "num_items_in_batch": 3})


def test_calls_without_labels_and_errors_leave_the_model_alone() -> None:
    model = adapted("llama")
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with supervised_loss(model):
        torch.testing.assert_close(model(**inputs).logits, adapted("llama")(**inputs).logits)
        assert model.generate(**inputs, max_new_tokens=2, pad_token_id=0).shape == (3, 13)
    with pytest.raises(IndexError), supervised_loss(model):
        model(**{**batch(), "input_ids": batch()["input_ids"] + 1000})
    assert "_loss_function" not in vars(model)
    assert not model._forward_hooks and not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    with supervised_loss(model, enabled=False):
        assert model(**batch()).logits is not None


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_half_precision(kind: str) -> None:
    model = adapted("llama")
    model = model.bfloat16() if kind == "bfloat16" else model
    plain = copy.deepcopy(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            with supervised_loss(model):
                loss = model(**batch()).loss
            reference = plain(**batch()).loss
        assert loss.dtype == reference.dtype == torch.float32
        torch.testing.assert_close(loss, reference, rtol=2e-3, atol=0)
        model.zero_grad(), plain.zero_grad()
        loss.backward(), reference.backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            if mine.grad is not None:
                assert (mine.grad - theirs.grad).norm() <= 0.03 * theirs.grad.norm()


def test_gradient_checkpointing() -> None:
    model = adapted("llama").train()
    checkpointing(model, True)
    assert_equal_to_plain(model, batch())


def rows_seen(model: Any, path: str, inputs: dict[str, Any], **more: Any) -> tuple[int, Any]:
    """How many rows a layer sees in a training step, and the model's output."""
    seen: list[int] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(out[..., 0].numel()))
    with supervised_loss(model):
        output = model(**inputs, **more)
        output.loss.backward()
    handle.remove()
    return seen[0], output


FFNS = {
    "llama": "model.layers.1.mlp.down_proj",
    "gemma": "model.layers.1.mlp.down_proj",
    "phi": "model.layers.1.mlp.fc2",
    "gpt2": "transformer.h.1.mlp.c_proj",
    "gptj": "transformer.h.1.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h",
    "falcon": "transformer.h.1.mlp.dense_4h_to_h",
}


@pytest.mark.parametrize("name", FFNS)
def test_the_last_ffn_sees_the_supervised_rows_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch()
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    assert rows_seen(adapted(name), FFNS[name], inputs)[0] == supervised
    first = FFNS[name].replace(".1.", ".0.")
    assert rows_seen(adapted(name), first, inputs)[0] == inputs["input_ids"].numel()
    monkeypatch.setattr(supervised_ffn, "SUPERVISED_FFN", False)
    assert rows_seen(adapted(name), FFNS[name], inputs)[0] == inputs["input_ids"].numel()


def test_all_rows_where_they_are_asked_for_or_computed_again() -> None:
    inputs = batch()
    count, output = rows_seen(adapted("llama"), FFNS["llama"], inputs, output_hidden_states=True)
    assert count == inputs["input_ids"].numel()
    states = adapted("llama")(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(output.hidden_states, states)
    model = adapted("llama").train()
    checkpointing(model, True)
    assert rows_seen(model, FFNS["llama"], inputs)[0] == inputs["input_ids"].numel()
    assert supervised_ffn.last_ffn(adapted("mixtral")) is None


@pytest.mark.parametrize("settings", [AdapterHSettings, AdapterPSettings, ParallelSettings])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gpt_neox"])
def test_adapters_around_the_last_ffn(name: str, settings: Any) -> None:
    model = adapted(name, settings(reduction_factor=2))
    assert rows_seen(model, FFNS[name], batch())[0] < batch()["input_ids"].numel()
    assert_equal_to_plain(model, batch())


def test_data_parallel_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    assert_equal_to_plain(Wrapper(adapted("llama")), batch())


def test_lightning_module(decoder: Path) -> None:
    losses = {}
    for enabled in (True, False):
        torch.manual_seed(0)
        module = lit_peft.LoRA(base=str(decoder), supervised_loss=enabled)
        module.configure_model()
        inputs = {name: value.clamp(max=39) for name, value in batch().items()}
        losses[enabled] = module.training_step(inputs, 0)
        module.validation_step(inputs, 0)
        losses[enabled, "val"] = module.val_metrics["perplexity"].compute()
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[True, "val"], losses[False, "val"], rtol=1e-5, atol=0)


def test_the_first_step_is_computed_as_later_ones() -> None:
    """To the bit: a resumed run begins with what was a later step of the run that was killed."""
    model, inputs, seen = adapted("llama"), batch(), []
    for _ in range(3):
        model.zero_grad()
        with supervised_loss(model):
            loss = model(**inputs).loss
        loss.backward()
        seen.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for later in seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(seen[0], later, strict=True))
