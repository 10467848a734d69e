"""The attention mask of rows padded on the right is left out where that changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import DECODERS, QUIET, batch, close, make, scramble
from test_changes import SETTINGS

import lit_peft
from lit_peft.tasks import find_task
from lit_peft.tasks.right_padding import ignores_right_padding

NEEDS_IT = {"gpt2"}  # warns without a mask


def padded(name: str) -> dict[str, Any]:
    """Rows of 7 and 4 tokens; padding is no label."""
    rows = batch(name)
    rows["attention_mask"][1, 4:] = 0
    rows["labels"] = rows["labels"].masked_fill(rows["attention_mask"] == 0, -100)
    return rows


@pytest.mark.parametrize("architecture", DECODERS)
def test_causal_models_ignore_padding_on_the_right(architecture: str) -> None:
    model = make(architecture).train()
    assert ignores_right_padding(model) is (architecture not in NEEDS_IT)
    assert all(module.training for module in model.modules())


def test_models_that_see_later_tokens_keep_the_mask() -> None:
    import transformers

    config = transformers.BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert not ignores_right_padding(transformers.BertLMHeadModel(config))
    sees_all = make("llama")
    for layer in sees_all.model.layers:
        layer.self_attn.is_causal = False
    assert not ignores_right_padding(sees_all)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "bloom", "gpt2", "opt"])
def test_loss_and_gradients_are_the_same(method: str, architecture: str) -> None:
    model = lit_peft.attach(make(architecture), SETTINGS[method])
    scramble(model)
    found = []
    for pads_right in (False, True):
        task = find_task("causal_lm")
        task.prepare(model)
        task.pads_right = pads_right
        given: list[Any] = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs, given=given: given.append(kwargs.get("attention_mask")), with_kwargs=True
        )
        model.zero_grad()
        rows = padded(architecture)
        loss = task.loss(task.forward(model, dict(rows)), rows)
        loss.backward()
        hook.remove()
        assert (given[-1] is None) is (pads_right and task.ignores_right_padding)  # type: ignore[attr-defined]
        trained = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append(torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in trained)]))
    close(found[1], found[0], tolerance=1e-5)


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_the_data_module_decides(side: Any, decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("".join("good film " * count + "\n" for count in range(1, 21)))
    data = lit_peft.CausalLMData(
        base=str(decoder), train=str(tmp_path / "texts.txt"), batch_size=2, max_length=8, padding_side=side
    )
    module = lit_peft.LoRA(base=str(decoder))
    masks = []
    module.configure_model()
    module.model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    pl.Trainer(max_steps=2, limit_val_batches=1, enable_checkpointing=False, **QUIET).fit(module, data)
    in_training = masks[-2:]
    assert all((mask is None) is (side != "left") for mask in in_training)
