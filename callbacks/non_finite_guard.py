"""Stop training at a loss that is infinite or NaN, before it reaches the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor


class NonFiniteGuard(Callback):
    """Stops training at the first loss that is infinite or NaN, and saves the batch that caused it.

    The optimizer step is skipped, so that the weights and the optimizer do not change. Training ends as with
    `EarlyStopping`, including its checkpoints. The tensors of the batch are written by name to
    `nonfinite-step=STEP-rank=RANK.safetensors`, with step, batch index and loss as metadata. All processes stop if one
    has such a loss.

    Args:
        dirpath: folder for the batch; the run's folder if unset.

    Attributes:
        saved: the file with this process's batch; None if there is none.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.saved: Path | None = None
        self._batch: Any = None
        self._batch_idx = 0
        self._stopped = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved, self._stopped = None, False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        bad = not bool(torch.isfinite(loss.detach()).all())
        if bad:
            self._save(trainer, float(loss.detach().float().sum()))
        if trainer.strategy.reduce_boolean_decision(bad, all=False):
            self._stopped = trainer.should_stop = True
            rank_zero_warn(
                f"The loss is not finite at step {trainer.global_step}: training stops without this step"
                + (f", and the batch is in {self.saved}." if self.saved else ".")
            )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        # A gradient scaler (16-mixed) skips the step itself, and needs the gradients to decide that.
        if self._stopped and getattr(trainer.precision_plugin, "scaler", None) is None:
            for parameter in pl_module.parameters():
                parameter.grad = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._batch = None

    def _save(self, trainer: pl.Trainer, loss: float) -> None:
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"nonfinite-step={trainer.global_step}-rank={trainer.global_rank}.safetensors"
        facts = {"step": trainer.global_step, "batch_idx": self._batch_idx, "loss": loss}
        save_file(_tensors(self._batch), path, metadata={name: str(value) for name, value in facts.items()})
        self.saved = path


def _tensors(batch: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dicts, lists and tuples, by their paths."""
    if isinstance(batch, Tensor):
        return {name or "batch": batch.detach().cpu().clone().contiguous()}
    items = batch.items() if isinstance(batch, dict) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    return {
        key: value
        for part, inner in items
        for key, value in _tensors(inner, f"{name}.{part}" if name else str(part)).items()
    }
