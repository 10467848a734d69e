"""Optimizer and learning-rate schedule from plain settings, so that checkpoints stay plain data."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch.optim import Optimizer

from lit_peft.util.errors import LitPeftError, closest

SCHEDULES = ("linear", "cosine", "constant")


def make_optimizer(
    groups: list[dict[str, Any]], name: str, learning_rate: float, arguments: dict[str, Any]
) -> Optimizer:
    """Build an optimizer.

    Args:
        groups: parameter groups, each with its own `lr`.
        name: a class of `torch.optim` (`AdamW`) or an import path (`package.module.Class`).
        learning_rate: the rate of groups without one.
        arguments: further arguments of the class.

    Raises:
        LitPeftError: there is no such class, or it does not take the arguments.
    """
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "torch.optim"), attribute)
    except (ImportError, AttributeError):
        known = [key for key, value in vars(torch.optim).items() if isinstance(value, type)]
        raise LitPeftError(
            f"optimizer={name!r} is not an optimizer of torch.optim, nor an import path: the closest are "
            f"{closest(attribute, known)}."
        ) from None
    try:
        optimizer: Optimizer = kind(groups, lr=learning_rate, **arguments)
    except (TypeError, ValueError) as problem:
        raise LitPeftError(f"optimizer={name!r} does not take optimizer_args={arguments}: {problem}.") from problem
    return optimizer


def make_schedule(optimizer: Optimizer, name: str, warmup_steps: int, total_steps: float) -> Any:
    """Build a schedule: a linear rise from 0 over the warmup, then `linear` or `cosine` fall to 0, or `constant`.

    Args:
        optimizer: what to schedule.
        name: one of `linear`, `cosine`, `constant`.
        warmup_steps: optimizer steps of the rise.
        total_steps: optimizer steps of the whole training.

    Raises:
        LitPeftError: the name is not known, or the fall has no end to aim at.
    """
    if name not in SCHEDULES:
        raise LitPeftError(f"lr_scheduler={name!r} is not known: use {closest(name, SCHEDULES)}.")
    if name != "constant" and not math.isfinite(total_steps):
        raise LitPeftError(
            f"lr_scheduler={name!r} must know how long training lasts: set trainer.max_steps or trainer.max_epochs, "
            "or use lr_scheduler='constant'."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if name == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
        return 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
