"""Check that frozen weights do not change."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lit_peft.callbacks.tensors import parts
from torch import Tensor, nn

from lit_peft.util.errors import LitPeftError


class FrozenWeightsGuard(Callback):
    """Stops training with an error if a frozen parameter has changed, or is no longer frozen.

    A checksum over all bits of each frozen parameter is computed when training starts, and compared at intervals and at
    the end: a single changed bit is found. It is computed on the parameter's device, and one number is read back.

    Args:
        every_n_steps: optimizer steps between checks.

    Raises:
        LitPeftError: a frozen parameter changed; the message names it. Or `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise LitPeftError(f"every_n_steps={every_n_steps}: give a positive number, e.g. 100.")
        self.every_n_steps = every_n_steps
        self._sums: dict[str, Tensor] = {}
        self._checked = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums, self._checked = _checksums(pl_module), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step - self._checked >= self.every_n_steps:
            self.check(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer, pl_module)

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare every frozen parameter with its checksum.

        Raises:
            LitPeftError: one has changed, or is no longer frozen.
        """
        now = _checksums(pl_module)
        frozen = [name for name in self._sums if name in now]
        changed = [name for name in self._sums if name not in now]
        if frozen:
            same = [(self._sums[name] == now[name]).to("cpu", non_blocking=True) for name in frozen]
            changed += [name for name, equal in zip(frozen, torch.stack(same).tolist(), strict=True) if not equal]
        if changed:
            raise LitPeftError(
                f"{len(changed)} frozen parameters changed, or are no longer frozen, between steps {self._checked} and "
                f"{trainer.global_step}: {', '.join(changed[:3])}. Find out what writes to them (an optimizer over all "
                "parameters, a tied weight, a callback), and resume from an earlier checkpoint."
            )
        self._checked = trainer.global_step


def _checksums(module: nn.Module) -> dict[str, Tensor]:
    return {name: _checksum(p) for name, p in module.named_parameters() if not p.requires_grad and p.numel()}


def _checksum(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in parts(tensor):
        flat = part.contiguous().reshape(-1)
        whole = flat.view(torch.uint8)
        words = whole[: whole.numel() // 4 * 4].view(torch.int32) if whole.data_ptr() % 4 == 0 else whole
        # With different factors, so that swapped halves are found as well.
        first, second = words.tensor_split(2)
        total += first.sum(dtype=torch.int64) + 3 * second.sum(dtype=torch.int64)
        total += 5 * whole[whole.numel() // 4 * 4 :].sum(dtype=torch.int64)
    return total
