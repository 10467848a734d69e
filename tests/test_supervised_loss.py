"""The supervised-only loss against the model's own: loss and gradients, on every architecture and kind of head."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DECODERS, GROUPED, SHAPE, checkpointing, make, scramble
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lit_peft
from lit_peft import AdapterHSettings, AdapterPSettings, LoRASettings, ParallelSettings, supervised_loss
from lit_peft.methods.attachment import MethodSettings
from lit_peft.tasks import supervised_loss as wiring
from lit_peft.tasks.supervised_loss import SupervisedLoss

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
    assert SupervisedLoss.of(model).finish is not None


def test_the_finish_is_found_or_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("gemma2", "cohere", "granite", "llama"):
        model = adapted(name)
        with supervised_loss(model):
            model(**batch())
        found[name] = SupervisedLoss.of(model).finish
    assert found == {"gemma2": (1.0, 5.0), "cohere": (0.25, None), "granite": (0.125, None), "llama": (1.0, None)}
    model = adapted("gemma2")
    monkeypatch.setattr(wiring, "find_finish", lambda *_: None)
    assert_equal_to_plain(model, batch())
    assert SupervisedLoss.of(model).finish is None


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


@pytest.mark.parametrize("settings", [AdapterHSettings, AdapterPSettings, ParallelSettings])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gpt_neox"])
def test_adapters_of_whole_sublayers(name: str, settings: Any) -> None:
    assert_equal_to_plain(adapted(name, settings(reduction_factor=2)), batch())


def rows_of_the_head(model: Any, inputs: dict[str, Any]) -> int:
    """How many rows the head computes in a call."""
    seen: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out[..., 0].numel()))
    model(**inputs)
    handle.remove()
    return seen[0]


def test_hooks_of_a_module_stay_and_act_only_in_a_step(decoder: Path) -> None:
    module = lit_peft.LoRA(base=str(decoder))
    module.configure_model()
    model, inputs = module.model, {name: value.clamp(max=39) for name, value in batch().items()}
    everything = inputs["input_ids"].numel()
    first = module.training_step(inputs, 0)
    hooks = [dict(part._forward_hooks) for part in (model, model.lm_head)]
    assert all(hooks) and rows_of_the_head(model, inputs) == everything
    torch.testing.assert_close(model(**inputs).loss, first, rtol=1e-5, atol=0)
    module.training_step(inputs, 0)
    assert [dict(part._forward_hooks) for part in (model, model.lm_head)] == hooks
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied.training_step(inputs, 0), first, rtol=1e-5, atol=0)
    assert copied.task.supervised.model is copied.model
    pickled = pickle.loads(pickle.dumps(model))
    assert SupervisedLoss.of(pickled).model is pickled
    with SupervisedLoss.of(pickled).active():
        torch.testing.assert_close(pickled(**inputs).loss, first, rtol=1e-5, atol=0)
    with supervised_loss(model):
        assert rows_of_the_head(model, inputs) == 1  # whose logits nobody uses
    assert not model._forward_hooks and not model.lm_head._forward_hooks
    torch.testing.assert_close(module.training_step(inputs, 0), first, rtol=1e-5, atol=0)


def test_a_head_that_an_adapter_replaces_is_followed(decoder: Path) -> None:
    module = lit_peft.LoRA(base=str(decoder))
    module.configure_model()
    inputs = {name: value.clamp(max=39) for name, value in batch().items()}
    module.training_step(inputs, 0)
    module.add_adapter("head", LoRASettings(target_modules=["lm_head"]))
    scramble(module.model)
    for name in ("head", "default", "head"):
        module.set_adapter(name)
        torch.testing.assert_close(module.training_step(inputs, 0), module.model(**inputs).loss, rtol=1e-5, atol=0)


def test_another_loss_of_the_model_is_left_alone() -> None:
    model = adapted("llama")
    with supervised_loss(model):
        model(**batch())
    model.loss_function = lambda logits, **_: logits.sum() * 0 + 3
    with supervised_loss(model):
        output = model(**batch())
    assert float(output.loss.detach()) == 3 and output.logits is not None


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


def test_adapters_may_change_between_the_steps() -> None:
    """The hooks of a prompt, put back on the model, still act before those of the loss."""
    model = lit_peft.attach(make("llama"), lit_peft.PromptTuningSettings(num_virtual_tokens=3))
    lit_peft.add_adapter(model, "other", lit_peft.PromptTuningSettings(num_virtual_tokens=4))
    ids = torch.randint(5, 50, (2, 9))

    def losses() -> list[float]:
        found = []
        for name in ("default", "other"):
            lit_peft.set_adapter(model, name)
            found.append(model(input_ids=ids, labels=ids).loss.item())
            with lit_peft.disable_adapter(model):
                found.append(model(input_ids=ids, labels=ids).loss.item())
        return found

    expected = losses()
    with supervised_loss(model):
        assert losses() == pytest.approx(expected, rel=1e-5)
