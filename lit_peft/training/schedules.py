"""Schedules of the learning rate by name: three of our own, and those of transformers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lit_peft.util.errors import LitPeftError, closest

# Ours: a linear rise from 0 during the warmup, then a fall to 0, or no fall.
_OWN = ("linear", "cosine", "constant")
PLATEAU = "reduce_lr_on_plateau"
# It decides by the loss of each step, which Lightning does not give a schedule.
_LEFT_OUT = ("greedy",)
# Arguments that are not for users.
_SET = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "mode")


def schedule_names() -> list[str]:
    """Return the names of all schedules."""
    return [*_OWN, *(name for name in _functions() if name not in (*_OWN, *_LEFT_OUT))]


def check_schedule(name: str, arguments: Mapping[str, Any], warmup_steps: float, learning_rate: float | None) -> None:
    """Check a schedule's settings before a run.

    Args:
        name: the schedule's name.
        arguments: its further arguments.
        warmup_steps: optimizer steps of the warmup; below 1, a share of all steps.
        learning_rate: the peak learning rate; None if the method's usual one is used.

    Raises:
        LitPeftError: the name or an argument is not known, or a value does not fit.
    """
    if name not in schedule_names():
        raise LitPeftError(f"lr_scheduler={name!r} is not known: use {closest(name, schedule_names())}.")
    known = _arguments_of(name)
    unknown = next((argument for argument in arguments if argument not in known), None)
    if unknown is not None:
        fix = f"use {closest(unknown, known)}" if known else "it has none, so leave lr_scheduler_kwargs out"
        raise LitPeftError(f"lr_scheduler_kwargs has {unknown!r}, which lr_scheduler={name!r} does not know: {fix}.")
    if name == PLATEAU and warmup_steps:
        raise LitPeftError(f"lr_scheduler={name!r} has no warmup: set warmup_steps to 0.")
    rate = learning_rate or 1.0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        schedule = schedule_for_run(optimizer, name, warmup_steps, 1_000, arguments)
        # What a value of a wrong type does shows when it is first used: in the warmup, at the peak, or at the end.
        for step in () if name == PLATEAU else (0, 1, 500, 999, 1_000):
            schedule.lr_lambdas[0](step)
    except LitPeftError:
        raise
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as problem:
        raise _unfit(name, arguments, problem) from problem


def schedule_for_run(
    optimizer: Optimizer,
    name: str,
    warmup_steps: float,
    total_steps: float,
    arguments: Mapping[str, Any] | None = None,
    mode: str = "min",
) -> Any:
    """Build the schedule of a run; see `make_schedule`.

    Args:
        optimizer: the optimizer to schedule.
        name: one of `schedule_names`.
        warmup_steps: optimizer steps of the warmup; below 1, a share of all steps.
        total_steps: optimizer steps of the run.
        arguments: further arguments; numbers of steps (`num_decay_steps`) below 1 are shares of all steps.
        mode: whether the metric of `reduce_lr_on_plateau` should be small (`min`) or large (`max`).

    Raises:
        LitPeftError: as `make_schedule`.
    """
    if name == PLATEAU:
        return ReduceLROnPlateau(optimizer, **{"mode": mode, **(arguments or {})})
    counts = {argument: _steps(value, total_steps) for argument, value in (arguments or {}).items()}
    given = {name: counts[name] if name.endswith("_steps") else value for name, value in (arguments or {}).items()}
    return make_schedule(optimizer, name, _steps(warmup_steps, total_steps), total_steps, given)


def _steps(value: Any, total_steps: float) -> Any:
    """Return a number of steps, of which a number below 1 is a share."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return value
    if value < 1:
        value = value * total_steps if math.isfinite(total_steps) else 0
    return round(value)


def make_schedule(
    optimizer: Optimizer,
    name: str,
    warmup_steps: int,
    total_steps: float,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Build a schedule: the linear rise from 0 during the warmup, and what the name says after it.

    `linear` and `cosine` fall to 0, and `constant` does not fall. The others are those of transformers'
    `get_scheduler`, as is `cosine` with arguments.

    Args:
        optimizer: the optimizer to schedule.
        name: one of `schedule_names`, but for `reduce_lr_on_plateau`.
        warmup_steps: optimizer steps of the rise.
        total_steps: optimizer steps of the whole training.
        arguments: further arguments of transformers' function.

    Raises:
        LitPeftError: the name is not known, an argument does not fit, or the rate depends on the number of steps,
            which is not known.
    """
    if name not in schedule_names():
        raise LitPeftError(f"lr_scheduler={name!r} is not known: use {closest(name, schedule_names())}.")
    endless = name in ("constant", "constant_with_warmup", "inverse_sqrt") or "num_stable_steps" in (arguments or {})
    if not endless and not math.isfinite(total_steps):
        raise LitPeftError(
            f"lr_scheduler={name!r} needs to know how long training lasts: set trainer.max_steps or "
            "trainer.max_epochs, or use lr_scheduler='constant'."
        )
    if name not in _OWN or arguments:
        function = _functions()[name]
        values: dict[str, Any] = dict(arguments or {})
        parameters = inspect.signature(function).parameters
        if "num_warmup_steps" in parameters:
            values["num_warmup_steps"] = warmup_steps
        if "num_training_steps" in parameters and "num_stable_steps" not in values:
            values["num_training_steps"] = int(total_steps)
        try:
            return function(optimizer, **values)
        except (TypeError, ValueError, AttributeError) as problem:
            raise _unfit(name, arguments or {}, problem) from problem

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if name == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
        return 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


@cache
def _functions() -> dict[str, Any]:
    """Return transformers' functions by the names of their schedules."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    return {str(kind.value): function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}


def _arguments_of(name: str) -> list[str]:
    """Return the arguments that `lr_scheduler_kwargs` may have for a schedule."""
    function = ReduceLROnPlateau if name == PLATEAU else _functions()[name]
    return [argument for argument in inspect.signature(function).parameters if argument not in _SET]


def _unfit(name: str, arguments: Mapping[str, Any], problem: Exception) -> LitPeftError:
    return LitPeftError(f"lr_scheduler={name!r} does not accept lr_scheduler_kwargs={dict(arguments)}: {problem}.")
