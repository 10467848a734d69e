"""Optimizer and learning-rate schedule, made from plain settings so that checkpoints contain only plain data."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_peft.util.errors import LitPeftError, closest

SCHEDULES = ("linear", "cosine", "constant")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    rate_factor: Callable[[str], float],
) -> list[dict[str, Any]]:
    """Return an optimizer's groups of the trained parameters.

    Args:
        parameters: parameters by name; frozen ones are skipped.
        learning_rate: peak learning rate.
        weight_decay: for matrices; vectors have none.
        rate_factor: returns the factor of the learning rate for a parameter's name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate_factor(name), decay), []).append(parameter)
    return [
        {"params": members, "lr": learning_rate * factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]


def check_finite(loss: Tensor, parameters: Iterable[nn.Parameter], step: int, learning_rate: float) -> None:
    """Stop a run whose trained weights can never recover.

    Raises:
        LitPeftError: the loss is NaN or infinite, and so is a trained weight.
    """
    if not loss.isfinite() and not all(p.isfinite().all() for p in parameters if p.requires_grad):
        raise LitPeftError(
            f"At step {step} the loss is {float(loss.detach())} and trained weights are NaN or infinite: lower "
            f"learning_rate (now {learning_rate:g}), set trainer.gradient_clip_val=1.0, or use "
            "trainer.precision=bf16-mixed instead of 16-mixed. Earlier checkpoints are not affected."
        )


def make_optimizer(
    groups: list[dict[str, Any]], name: str, learning_rate: float, arguments: dict[str, Any]
) -> Optimizer:
    """Build an optimizer.

    Args:
        groups: parameter groups, each with its own `lr`.
        name: a class of `torch.optim` (`AdamW`) or an import path (`package.module.Class`).
        learning_rate: learning rate of groups without one.
        arguments: further arguments of the class.

    Raises:
        LitPeftError: there is no such class, or it does not accept the arguments.
    """
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "torch.optim"), attribute)
    except (ImportError, AttributeError):
        known = [key for key, value in vars(torch.optim).items() if isinstance(value, type)]
        raise LitPeftError(
            f"optimizer={name!r} is neither an optimizer of torch.optim nor an import path: the closest are "
            f"{closest(attribute, known)}."
        ) from None
    try:
        optimizer: Optimizer = kind(groups, lr=learning_rate, **arguments)
    except (TypeError, ValueError) as problem:
        raise LitPeftError(f"optimizer={name!r} does not accept optimizer_args={arguments}: {problem}.") from problem
    return optimizer


def schedule_for_run(optimizer: Optimizer, name: str, warmup_steps: float, total_steps: float) -> Any:
    """Build the schedule of a run; see `make_schedule`.

    Args:
        optimizer: the optimizer to schedule.
        name: one of `linear`, `cosine`, `constant`.
        warmup_steps: optimizer steps of the warmup; below 1, a share of all steps.
        total_steps: optimizer steps of the run.

    Raises:
        LitPeftError: as `make_schedule`.
    """
    if warmup_steps < 1:
        warmup_steps = warmup_steps * total_steps if math.isfinite(total_steps) else 0
    return make_schedule(optimizer, name, round(warmup_steps), total_steps)


def make_schedule(optimizer: Optimizer, name: str, warmup_steps: int, total_steps: float) -> Any:
    """Build a schedule: a linear rise from 0 during the warmup, then a `linear` or `cosine` fall to 0, or `constant`.

    Args:
        optimizer: the optimizer to schedule.
        name: one of `linear`, `cosine`, `constant`.
        warmup_steps: optimizer steps of the rise.
        total_steps: optimizer steps of the whole training.

    Raises:
        LitPeftError: the name is not known, or the rate should fall but the number of steps is not known.
    """
    if name not in SCHEDULES:
        raise LitPeftError(f"lr_scheduler={name!r} is not known: use {closest(name, SCHEDULES)}.")
    if name != "constant" and not math.isfinite(total_steps):
        raise LitPeftError(
            f"lr_scheduler={name!r} needs to know how long training lasts: set trainer.max_steps or "
            "trainer.max_epochs, or use lr_scheduler='constant'."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if name == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
        return 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
