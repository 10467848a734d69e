"""Schedules of the learning rate against transformers' own, and optimizers by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import QUIET
from transformers import get_scheduler

import lit_peft
from lit_peft import CausalLMData, LitPeftError
from lit_peft.training.optimizer import find_optimizer
from lit_peft.training.schedules import make_schedule, schedule_for_run, schedule_names

STEPS, WARMUP = 40, 6
ARGUMENTS: dict[str, dict[str, Any]] = {
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "inverse_sqrt": {"timescale": 9},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.05},
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)


def rates(schedule: Any, steps: int = STEPS + 3) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", [name for name in schedule_names() if name != "reduce_lr_on_plateau"])
def test_each_schedule_is_that_of_transformers(name: str) -> None:
    arguments = ARGUMENTS.get(name, {})
    ours = rates(make_schedule(optimizer(), name, WARMUP, STEPS, arguments))
    # What we call `constant` has always had the warmup, for which transformers has another name.
    theirs = "constant_with_warmup" if name == "constant" else name
    expected = get_scheduler(theirs, optimizer(), WARMUP, STEPS, scheduler_specific_kwargs=arguments)
    assert ours == pytest.approx(rates(expected), rel=1e-12)
    assert max(ours) == pytest.approx(1e-2) and ours[0] < ours[WARMUP]


def test_the_three_of_our_own_are_what_they_were_to_the_bit() -> None:
    for name, fall in {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
    }.items():
        expected = [
            1e-2 * (step / WARMUP if step < WARMUP else fall(min(1.0, (step - WARMUP) / (STEPS - WARMUP))))
            for step in range(STEPS + 3)
        ]
        assert rates(schedule_for_run(optimizer(), name, WARMUP, STEPS)) == expected


def test_steps_below_one_are_shares_of_all_steps() -> None:
    shares = schedule_for_run(optimizer(), "warmup_stable_decay", 0.15, STEPS, {"num_decay_steps": 0.25})
    steps = make_schedule(optimizer(), "warmup_stable_decay", 6, STEPS, {"num_decay_steps": 10})
    assert rates(shares) == rates(steps)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler": "cosin"}, r"lr_scheduler='cosin' is not known: use 'cosine'"),
        ({"lr_scheduler": "greedy"}, "lr_scheduler='greedy' is not known"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "'a', which lr_scheduler='linear' does not know: it has none"),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rat": 0.1}},
            "'min_lr_rat', which .* does not know: use 'min_lr_rate'",
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, "does not accept lr_scheduler_kwargs={}: .*min_lr"),
        ({"lr_scheduler": "warmup_stable_decay"}, "num_decay_steps"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3, "decay_type": "x"}},
            "Unknown decay type: x",
        ),
        ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": "two"}}, "does not accept"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-2}, "learning_rate": 1e-3}, "lr_end"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "has no warmup: set warmup_steps to 0"),
        ({"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"last_epoch": 3}}, "'last_epoch', which"),
        ({"optimizer": "AdmW"}, "optimizer='AdmW' is neither .*'AdamW'"),
        ({"optimizer": "PagedAdamW8bits"}, "'PagedAdamW8bit'"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_anything_is_loaded(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LitPeftError, match=said):
        lit_peft.LoRA(base="nowhere", **settings)


def fit(
    decoder: Path,
    reviews: Path,
    folder: Path,
    resume: Any = None,
    epochs: int = 2,
    validation: int = 8,
    **settings: Any,
) -> pl.Trainer:
    pl.seed_everything(0)
    data = CausalLMData(
        base=str(decoder),
        train=str(reviews),
        max_length=16,
        limit_train=16,
        batch_size=4,
        validation_fraction=0.2 if validation else 0.0,
    )
    module = lit_peft.LoRA(base=str(decoder), **{"learning_rate": 1e-2, **settings})
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir=folder, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return trainer


def test_a_run_follows_its_schedule_and_a_resumed_one_goes_on_with_it(
    decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    settings = {"lr_scheduler": "inverse_sqrt", "warmup_steps": 2, "lr_scheduler_kwargs": {"timescale": 3}}
    whole = fit(decoder, reviews, tmp_path / "whole", **settings)
    expected = rates(get_scheduler("inverse_sqrt", optimizer(), 2, scheduler_specific_kwargs={"timescale": 3}), 9)
    assert whole.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected[8])
    fit(decoder, reviews, tmp_path / "half", epochs=1, **settings)
    resumed = fit(decoder, reviews, tmp_path / "half", tmp_path / "half" / "1.ckpt", **settings)
    states = [torch.load(tmp_path / run / "2.ckpt", weights_only=True) for run in ("whole", "half")]
    assert resumed.global_step == 8 and states[0]["lr_schedulers"] == states[1]["lr_schedulers"]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name])


def test_the_rate_falls_where_the_metric_does_not(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    settings = {"lr_scheduler": "reduce_lr_on_plateau", "warmup_steps": 0}
    arguments = {"factor": 0.5, "patience": 0, "threshold": 1e6, "threshold_mode": "abs"}
    trainer = fit(decoder, reviews, tmp_path, epochs=3, lr_scheduler_kwargs=arguments, **settings)
    # By an amount that no loss can fall, so that each epoch after the first is a plateau.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    with pytest.raises(LitPeftError, match="follows val_loss, and there is no validation data"):
        fit(decoder, reviews, tmp_path, validation=0, **settings)


def test_a_missing_bitsandbytes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(LitPeftError, match=r"optimizer='PagedAdamW8bit' needs bitsandbytes.*pip install bitsandbytes"):
        lit_peft.LoRA(base="nowhere", optimizer="PagedAdamW8bit")


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_run_with_an_optimizer_of_bitsandbytes_is_resumed(
    name: str, decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    assert find_optimizer(name) is getattr(optim, name)
    # Some matrices have 4,096 elements, from which on the states have 8 bits.
    settings: dict[str, Any] = {"optimizer": name, "r": 128, "learning_rate": 1e-3}
    trainer = fit(decoder, reviews, tmp_path / "whole", **settings)
    assert type(trainer.optimizers[0]) is getattr(optim, name)
    fit(decoder, reviews, tmp_path / "half", epochs=1, lr_scheduler="constant", **settings)
    fit(decoder, reviews, tmp_path / "half", tmp_path / "half" / "1.ckpt", lr_scheduler="constant", **settings)
    fit(decoder, reviews, tmp_path / "whole", lr_scheduler="constant", **settings)
    states = [torch.load(tmp_path / run / "2.ckpt", weights_only=True)["state_dict"] for run in ("whole", "half")]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])
