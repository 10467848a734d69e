"""Gradients accumulated over several batches are those of one large batch, whatever the batches' numbers of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import QUIET
from torch import Tensor
from torch.utils.data import DataLoader

import lit_peft

# Supervised tokens of each row: the batches of four have 6 and 30.
SUPERVISED = (1, 2, 1, 2, 8, 7, 8, 7)


def rows() -> list[dict[str, Tensor]]:
    made = []
    for index, count in enumerate(SUPERVISED):
        ids = torch.randint(5, 20, (9,), generator=torch.Generator().manual_seed(index))
        labels = torch.where(torch.arange(9) < 9 - count, -100, ids)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


class Gradients(pl.Callback):
    """Keeps the gradients of each optimizer step, and the reported losses."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.steps.append({name: gradient.detach().clone() for name, gradient in found.items()})

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def gradients(
    base: Path, batch_size: int, accumulate: int, rows: Any, method: str = "LoRA", **trainer: Any
) -> Gradients:
    pl.seed_everything(0, verbose=False)
    # So small a rate that the second step starts from the same weights as the first.
    module = getattr(lit_peft, method)(base=str(base), optimizer="SGD", learning_rate=1e-30, lr_scheduler="constant")
    callback = Gradients()
    callbacks = [callback, *trainer.pop("callbacks", ())]
    options = {**QUIET, "max_epochs": 1, "enable_checkpointing": False, "accumulate_grad_batches": accumulate}
    pl.Trainer(callbacks=callbacks, **{**options, **trainer}).fit(module, DataLoader(rows, batch_size=batch_size))
    return callback


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        assert (value - other[name]).norm() <= tolerance * other[name].norm(), name


@pytest.mark.parametrize("method", ["LoRA", "PromptTuning"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_small_batches_have_the_gradient_of_a_large_one(
    method: str, batch_size: int, accumulate: int, decoder: Path
) -> None:
    whole = gradients(decoder, 8, 1, rows(), method).steps
    parts = gradients(decoder, batch_size, accumulate, rows(), method).steps
    assert len(whole) == len(parts) == 1
    assert_close(parts[0], whole[0])


def test_clipping_sees_the_gradient_of_the_large_batch(decoder: Path) -> None:
    norm = torch.stack([g.norm() for g in gradients(decoder, 8, 1, rows()).steps[0].values()]).norm().item()

    class Clipped(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            found = [p.grad.norm() for p in module.parameters() if p.grad is not None]
            if found:
                norms.append(torch.stack(found).norm().item())

    norms: list[float] = []
    gradients(decoder, 4, 2, rows(), gradient_clip_val=norm / 2, callbacks=[Clipped()])
    assert norms[-1] == pytest.approx(norm / 2, rel=1e-4)


def test_a_last_group_of_fewer_batches_is_the_mean_of_its_own(decoder: Path) -> None:
    twelve = [*rows(), *rows()[2:6]]
    steps = gradients(decoder, 4, 2, twelve).steps
    assert len(steps) == 2
    assert_close(steps[0], gradients(decoder, 8, 1, rows()).steps[0])
    assert_close(steps[1], gradients(decoder, 4, 1, rows()[2:6]).steps[0])


def test_a_first_batch_without_supervised_tokens(decoder: Path) -> None:
    unsupervised = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()[:4]]
    steps = gradients(decoder, 4, 2, [*unsupervised, *rows()[4:]]).steps
    assert_close(steps[0], gradients(decoder, 4, 1, rows()[4:]).steps[0])


def test_equal_batches_have_the_same_bits_as_before_and_the_losses_are_the_batches_own(decoder: Path) -> None:
    equal = [*rows()[:4], *rows()[:4]]
    found, single = gradients(decoder, 4, 2, equal), gradients(decoder, 4, 1, rows()[:4])
    for name, value in found.steps[0].items():
        assert torch.equal(value, single.steps[0][name] / 2 + single.steps[0][name] / 2)
    assert found.losses == [single.losses[0] / 2] * 2  # Lightning reports shares of the sum
