"""Trains and validates an objective, in as many processes as torchrun starts: `objective_run.py KIND BASE ROWS OUT`.

ROWS are texts with lists of labels, of which KIND (`multi_label`, `regression` or `reward`) takes what it needs. A
fifth of them is for validation, or only the first one if KIND ends in `:one`. Writes the metrics of validation to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from models import QUIET

import lit_peft
from lit_peft.data import RewardData, TextClassificationData


class NoDropout(pl.Callback):
    """The processes draw different numbers, so their dropout is not that of one process."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0


def data_of(kind: str, one_row: bool, base: str, rows: str, out: Path, batch_size: int) -> Any:
    made = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    if kind == "regression":
        made = [{"text": row["text"], "a": len(row["text"]) / 20, "b": len(row["labels"])} for row in made]
    elif kind == "reward":
        both = zip(made[::2], made[1::2], strict=True)
        made = [{"chosen": one["text"], "rejected": other["text"]} for one, other in both]
    settings: dict[str, Any] = {"base": base, "batch_size": batch_size, "max_length": 16, "validation_fraction": 0.2}
    if one_row:
        del settings["validation_fraction"]
        settings["validation"] = write(out, "one", made[:1])
        made = made[len(made) // 5 :]
    train = write(out, kind, made)
    if kind == "reward":
        return RewardData(train=train, **settings)
    targets: dict[str, Any] = {"regression": True, "label_columns": ["a", "b"]} if kind == "regression" else {}
    return TextClassificationData(train=train, **targets, **settings)


def write(out: Path, name: str, rows: list[dict[str, Any]]) -> str:
    file = out.with_name(f"{name}{os.environ.get('RANK', 0)}.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def main(kind: str, base: str, rows: str, out: Path) -> None:
    world = int(os.environ["WORLD_SIZE"])
    kind, _, rest = kind.partition(":")
    pl.seed_everything(0)
    task = "reward" if kind == "reward" else "sequence_classification"
    # Without centring the loss does not fix the bias of the head, which rounding errors then move.
    args: dict[str, Any] = {"multi_label": {"pos_weight": "balanced"}, "reward": {"center_rewards_coefficient": 0.1}}
    args = args.get(kind, {})
    module = lit_peft.LoRA(base=base, task=task, r=2, lr_scheduler="constant", lora_dropout=0.0, task_args=args)
    data = data_of(kind, rest == "one", base, rows, out, 8 // world)
    settings: dict[str, Any] = {**QUIET, "devices": world, "strategy": "ddp", "enable_checkpointing": False}
    trainer = pl.Trainer(**settings, max_epochs=1, callbacks=[NoDropout()])
    trainer.fit(module, data)
    if trainer.is_global_zero:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        out.write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
