"""Predictions as JSON lines, in the order of the input."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes each predicted example as one JSON line with its row number, in input order over all processes.

    The file appears whole, at the end.

    Args:
        output: the file; `predictions.jsonl` in the run's folder when unset.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self._rows: list[tuple[int, dict[str, Any]]] = []

    def path(self, trainer: pl.Trainer) -> Path:
        """Return where the predictions go."""
        return Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rows = []

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        start = len(self._rows)
        numbers = batch_indices or range(start, start + len(prediction))
        self._rows.extend(zip(numbers, prediction, strict=True))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self.path(trainer)
        gathered: list[Any] = [self._rows]
        if trainer.world_size > 1:
            import torch.distributed as dist

            gathered = [None] * trainer.world_size
            dist.all_gather_object(gathered, self._rows)
        if trainer.is_global_zero:
            # A distributed sampler repeats rows to even out the processes: each row number once.
            rows = dict(row for part in gathered for row in part)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    for number in sorted(rows):
                        file.write(json.dumps({"row": number, **rows[number]}, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            print(f"predictions: {path} ({len(rows):,} rows)")
