"""A progress bar that shows tokens per second."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar


class TokenProgressBar(TQDMProgressBar):
    """Lightning's bar (loss, steps, elapsed and remaining time) with the tokens per second of all devices.

    Tokens are counted by the attention mask, so padding does not count; it does in packed rows, which have no mask.

    Args:
        refresh_rate: batches between updates; 0 disables the bar.
        process_position: line of the bar, if there are several.
        leave: keep the bars of finished epochs.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self._tokens: Any = 0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        if mask is None and isinstance(batch, dict) and "input_ids" in batch:
            self._tokens = self._tokens + batch["input_ids"].numel()
        elif mask is not None:
            # Added up on the device, so that nothing waits for the device until the bar is drawn.
            self._tokens = self._tokens + mask.sum()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the values to show after the bar."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        elapsed = time.perf_counter() - self._since
        if trainer.training and elapsed > 0 and int(self._tokens):
            items["tokens/s"] = f"{int(self._tokens) * trainer.world_size / elapsed:,.0f}"
        return items
