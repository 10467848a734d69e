"""The optimizer, made from plain settings so that checkpoints contain only plain data."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_peft.training.lightning_internals import datamodule_of
from lit_peft.training.schedules import PLATEAU, schedule_for_run
from lit_peft.util.errors import LitPeftError, closest, first_line

# Optimizers of bitsandbytes that torch does not have: with 8-bit or 32-bit states, and paged ones, whose states move to
# the memory of the machine while a GPU has too little.
_BITSANDBYTES = re.compile(
    r"(Paged)?(Adam|AdamW|Lion|AdEMAMix)(8bit|32bit)?|(LAMB|LARS|SGD|RMSprop|Adagrad)(8bit|32bit)?"
)


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


def find_optimizer(name: str) -> Any:
    """Return the class of an optimizer.

    Args:
        name: a class of `torch.optim` (`AdamW`), one of bitsandbytes (`AdamW8bit`, `PagedAdamW8bit`), or an import path
            (`package.module.Class`).

    Raises:
        LitPeftError: there is no such class, or its package is not installed.
    """
    module, _, attribute = name.rpartition(".")
    known = [key for key, value in vars(torch.optim).items() if isinstance(value, type)]
    if not module and name not in known and _BITSANDBYTES.fullmatch(name):
        module = "bitsandbytes.optim"
    try:
        return getattr(importlib.import_module(module or "torch.optim"), attribute)
    except ImportError as problem:
        if module == "bitsandbytes.optim":
            raise LitPeftError(
                f"optimizer={name!r} needs bitsandbytes, which cannot be imported ({first_line(problem)}): run `pip "
                "install bitsandbytes`, or use AdamW."
            ) from None
    except AttributeError:
        pass
    raise LitPeftError(
        f"optimizer={name!r} is neither an optimizer of torch.optim or bitsandbytes nor an import path: the closest "
        f"are {closest(attribute, [*known, 'AdamW8bit', 'PagedAdamW8bit', 'PagedAdamW32bit', 'Lion8bit', 'Lion'])}."
    )


def make_optimizer(
    groups: list[dict[str, Any]], name: str, learning_rate: float, arguments: dict[str, Any]
) -> Optimizer:
    """Build an optimizer.

    Args:
        groups: parameter groups, each with its own `lr`.
        name: see `find_optimizer`.
        learning_rate: learning rate of groups without one.
        arguments: further arguments of the class.

    Raises:
        LitPeftError: there is no such class, or it does not accept the arguments.
    """
    kind = find_optimizer(name)
    try:
        optimizer: Optimizer = kind(groups, lr=learning_rate, **arguments)
    except (TypeError, ValueError) as problem:
        raise LitPeftError(f"optimizer={name!r} does not accept optimizer_args={arguments}: {problem}.") from problem
    return optimizer


def with_fused(hparams: Any, groups: list[dict[str, Any]], trainer: Any, device: str = "cuda") -> dict[str, Any]:
    """Return the optimizer's arguments, with `fused=True` where that saves time on a GPU and is possible.

    Lightning cannot clip or unscale the gradients of a fused optimizer under mixed precision.

    Args:
        hparams: `optimizer` and `optimizer_args`. If these have one of `fused`, `foreach`, `capturable` and
            `differentiable`, nothing is added.
        groups: the parameter groups.
        trainer: the trainer that steps; None if there is none.
        device: the kind of device for which the fused form is used.
    """
    arguments: dict[str, Any] = hparams.optimizer_args
    precision = getattr(trainer, "precision_plugin", None)
    clipped = getattr(trainer, "gradient_clip_val", None) or getattr(precision, "scaler", None) is not None
    if (
        hparams.optimizer in ("Adam", "AdamW")
        and not {"fused", "foreach", "capturable", "differentiable"} & set(arguments)
        and all(type(p) is nn.Parameter and p.device.type == device for group in groups for p in group["params"])
        and not (isinstance(precision, MixedPrecision) and clipped)
    ):
        return {**arguments, "fused": True}
    return arguments


def lightning_schedule(module: Any, optimizer: Optimizer) -> dict[str, Any]:
    """Return the schedule of a module's run, in the form that Lightning expects.

    It steps with the optimizer; `reduce_lr_on_plateau` steps at the end of each epoch, by the metric that selects the
    best checkpoint.

    Raises:
        LitPeftError: the schedule does not fit the run.
    """
    hparams, (monitor, mode) = module.hparams, module.task.monitor
    plateau = hparams.lr_scheduler == PLATEAU
    if plateau and not getattr(datamodule_of(module), "rows", {"validation": ()}).get("validation"):
        raise LitPeftError(f"lr_scheduler={PLATEAU!r} follows {monitor}, and there is no validation data: give some.")
    total = module.trainer.estimated_stepping_batches
    arguments = hparams.lr_scheduler_kwargs
    schedule = schedule_for_run(optimizer, hparams.lr_scheduler, hparams.warmup_steps, total, arguments, mode)
    return {"scheduler": schedule, **({"interval": "epoch", "monitor": monitor} if plateau else {"interval": "step"})}
