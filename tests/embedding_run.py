"""Trains an embedding in as many processes as torchrun starts: `embedding_run.py STRATEGY OUT BASE DATA LOSS SIZE`.
Writes OUT: losses, the gradients of the first step, the trained tensors, and the validation metrics."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lit_peft
from lit_peft.data import EmbeddingData
from lit_peft.training.sharding import whole, whole_parameters
from lit_peft.training.strategies import ShardedStrategy


class Seen(pl.Callback):
    """The loss of each step, and the gradients of the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def main() -> None:
    strategy, out, base, data, loss_type, size = sys.argv[1:]
    world = int(os.environ.get("WORLD_SIZE", 1))
    pl.seed_everything(0)
    task_args: dict[str, Any] = {"loss_type": loss_type}
    if int(size):
        task_args["mini_batch_size"] = int(size)
    module = lit_peft.LoRA(
        base=base, task="embedding", task_args=task_args, learning_rate=1e-3, lr_scheduler="constant", warmup_steps=0
    )
    rows = EmbeddingData(
        base=base, train=data, validation=data, batch_size=16 // world, max_length=16, limit_validation=61
    )
    rows.drops_overlap = False
    seen = Seen()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ShardedStrategy() if strategy == "fsdp2" else strategy,
        max_steps=3,
        max_epochs=1,
        val_check_interval=3,
        callbacks=[seen],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=Path(out).parent,
    )
    trainer.fit(module, rows)
    with whole_parameters(module):
        trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if trainer.is_global_zero:
        metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        kept = {"losses": seen.losses, "gradients": seen.gradients, "trained": trained, "metrics": metrics}
        torch.save(kept, out)


if __name__ == "__main__":
    main()
