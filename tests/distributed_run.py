"""Trains methods under a strategy, in as many processes as torchrun starts: `distributed_run.py STRATEGY OUT BASE DATA
SINGLE TASK METHODS…` (`ddp/2`: with the gradients of two batches). Writes OUT/METHOD.pt (losses, trained tensors),
OUT/METHOD.ckpt and an adapter's folder; the same in OUT/half for LoRA's first epoch, and in OUT/resumed for LoRA from
SINGLE/half/LoRA.ckpt."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lit_peft.callbacks import AdapterCheckpoint
from models import METHODS
from torch.utils.data import DataLoader

import lit_peft
from lit_peft.data import CausalLMData, TextClassificationData
from lit_peft.training.sharding import whole, whole_parameters
from lit_peft.training.strategies import ShardedStrategy


class Losses(pl.Callback):
    """The loss of each step, averaged over the processes."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def train(
    strategy: str,
    method: str,
    base: str,
    data: str,
    out: Path,
    steps: int,
    resume: Path | None,
    task: str = "sequence_classification",
) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    strategy, _, accumulate = strategy.partition("/")
    parts = world if strategy == "tensor_parallel" else 1
    causal = task == "causal_lm"
    settings = {**METHODS[method], **({"target_modules": "all-linear"} if causal and method == "LoRA" else {})}
    pl.seed_everything(0)
    module = getattr(lit_peft, method)(
        base=base, task=task, learning_rate=1e-2 if causal else 1e-3, lr_scheduler="constant", **settings
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ShardedStrategy(tensor_parallel_size=parts) if strategy in ("fsdp2", "tensor_parallel") else strategy,
        max_epochs=steps // 2,
        accumulate_grad_batches=int(accumulate or 1),
        callbacks=[losses, AdapterCheckpoint(str(out / method), every_n_train_steps=steps, save_top_k=0)],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    kind: Any = CausalLMData if causal else TextClassificationData
    share = 16 * parts // world
    rows = kind(base=base, train=data, batch_size=share, limit_train=32, validation_fraction=0)
    # Two steps are an epoch.
    trainer.fit(module, rows, ckpt_path=resume)
    trainer.save_checkpoint(out / f"{method}.ckpt")
    held = sum(p._local_tensor.numel() if hasattr(p, "_local_tensor") else p.numel() for p in module.parameters())
    with whole_parameters(module):
        trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if trainer.is_global_zero:
        total = sum(p.numel() for p in module.parameters())
        result = {"losses": losses.values, "trained": {k: whole(v) for k, v in trained.items()}, "held": held / total}
        torch.save(result, out / f"{method}.pt")


def accumulate(strategy: str, base: str, out: Path) -> None:
    """Write OUT/gradients.pt: the gradient of eight rows with different numbers of labels, in two batches of each
    process, or in a single one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 20, (8, 9), generator=generator)
    labels = torch.where(torch.arange(9) < torch.tensor([1, 9, 2, 8, 3, 7, 1, 1])[:, None], ids % 2, -100)
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": x} for i, x in zip(ids, labels, strict=True)
    ]
    found: dict[str, torch.Tensor] = {}

    class Gradients(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.update({n: whole(p.grad).clone() for n, p in module.named_parameters() if p.grad is not None})

    pl.seed_everything(0)
    module = lit_peft.LoRA(base=base, task="token_classification", labels=["a", "b"], lr_scheduler="constant")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ShardedStrategy() if strategy == "fsdp2" else strategy,
        max_epochs=1,
        accumulate_grad_batches=1 if world == 1 else 2,
        callbacks=[Gradients()],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=8 if world == 1 else 4 // world))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        torch.save(found, out / "gradients.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    strategy, out, base, data, single, task, *methods = sys.argv[1:]
    for method in methods:
        train(strategy, method, base, data, Path(out), 4, None, task)
    train(strategy, "LoRA", base, data, Path(out) / "half", 2, None, task)
    train(strategy, "LoRA", base, data, Path(out) / "resumed", 4, Path(single) / "half" / "LoRA.ckpt", task)
    if task == "sequence_classification":
        accumulate(strategy, base, Path(out))
