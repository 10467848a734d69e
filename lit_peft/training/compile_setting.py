"""The setting `compile` of a module: when the layers are compiled, and what happens if they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_peft.models.compiled_layers import compile_layers, restore_layers
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief


def compile_for_training(module: Any, loss: Callable[[], Tensor]) -> None:
    """Compile the layers of a `BaseLM` if its setting `compile` says so, and try the code once.

    The trial computes a loss and its gradients, which are not used. If it fails, training goes on without compiled
    layers, and a warning says why.

    Args:
        module: a `BaseLM` with a Trainer, before its first training step.
        loss: computes the loss of the first batch.

    Raises:
        LitPeftError: `compile=True`, and the model has no layers of a known structure.
    """
    setting, strategy = module.hparams.compile, module.trainer.strategy
    restore_layers(module.model)
    if setting is False or (setting == "auto" and module.device.type != "cuda"):
        return
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        if setting is True:
            rank_zero_warn(f"compile=True has no effect under {type(strategy).__name__}, which splits the layers.")
        return
    try:
        count = compile_layers(module.model)
        rank_zero_info(f"Compiling {count} layers: the first step takes up to a minute longer.")
        with module.trainer.precision_plugin.train_step_context():
            # Not `backward`: under DDP the processes exchange the gradients that it accumulates.
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss(), trained, allow_unused=True)
    except Exception as problem:
        # Compilers raise errors of many classes. One of the model itself is raised again by the training step.
        restore_layers(module.model)
        if setting is True and isinstance(problem, LitPeftError):
            raise
        reason = brief(" ".join(str(problem).split()))
        rank_zero_warn(
            f"The layers could not be compiled ({type(problem).__name__}: {reason}), so training goes on without, with "
            "the same results but more slowly. With compile=False this is not tried."
        )
