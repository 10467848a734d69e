"""Checks of a module's settings that need no model and no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lit_peft.models.generation import check_generation
from lit_peft.models.quantization import check_quantization
from lit_peft.tasks.base import Task
from lit_peft.training.optimizer import find_optimizer
from lit_peft.training.schedules import check_schedule
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief


def check_settings(values: Mapping[str, Any], task: Task) -> None:
    """Refuse values of `BaseLM`'s arguments that are out of range.

    Raises:
        LitPeftError: names the first such argument, its value and the fix.
    """
    _check_optimization(values)
    num_labels, labels = values["num_labels"], values["labels"]
    if num_labels is not None and num_labels < 1:
        raise LitPeftError(f"num_labels={num_labels}: give a number of at least 1; 1 is regression.")
    if labels is not None and len(set(labels)) < max(len(labels), 1):
        raise LitPeftError(f"labels={brief(labels)}: give each class a different name, or leave it out.")
    for name in ("dtype", "adapter_dtype"):
        found = getattr(torch, values[name] or "float32", None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise LitPeftError(f"{name}={values[name]!r} is not known: use 'float32', 'bfloat16' or 'float16'.")
    if values["compile"] not in (True, False, "auto"):
        raise LitPeftError(f"compile={values['compile']!r} is not known: use True, False or 'auto'.")
    check_quantization(values["quantization"])
    check_generation(values["generation"] or {})
    if values["generation"] and not task.generates:
        raise LitPeftError(f"generation is set, but task={task.name!r} generates no text: leave generation out.")
    if values["stack"] and task.compares_with_base:
        raise LitPeftError(
            f"stack={brief(values['stack'])} and task={task.name!r} do not go together: the reference is the base, "
            "without the adapters below. Leave stack out, or use a loss without a reference (loss_type: simpo or orpo)."
        )
    if values["neftune_noise_alpha"] and task.mini_batch_size:
        raise LitPeftError(
            f"neftune_noise_alpha={values['neftune_noise_alpha']} and mini_batch_size of task_args are both set, but "
            "activations that are computed again would have no noise: leave one of them out."
        )


def _check_optimization(values: Mapping[str, Any]) -> None:
    rate = values["learning_rate"]
    if rate is not None and not rate > 0:
        raise LitPeftError(f"learning_rate={rate}: give a positive number, e.g. 5e-4.")
    if values["warmup_steps"] < 0:
        raise LitPeftError(
            f"warmup_steps={values['warmup_steps']}: give a number of steps, or a share of all steps below 1."
        )
    if values["weight_decay"] < 0:
        raise LitPeftError(f"weight_decay={values['weight_decay']}: give a number of at least 0, e.g. 0.01.")
    check_schedule(values["lr_scheduler"], values["lr_scheduler_kwargs"] or {}, values["warmup_steps"], rate)
    if (
        "." not in values["optimizer"]
    ):  # a path may come from a stranger's checkpoint, and is imported for training alone
        find_optimizer(values["optimizer"])
    alpha = values["neftune_noise_alpha"]
    if alpha is not None and not alpha > 0:
        raise LitPeftError(
            f"neftune_noise_alpha={alpha}: give a positive number, e.g. 5, or leave it out for no noise."
        )
