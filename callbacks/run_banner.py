"""Print what will be trained, in a few lines."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_peft.methods.attachment import trainable_parameters


class RunBanner(Callback):
    """Prints the base, method, trainable parameters, precision, devices and results folder when fitting starts.

    Works with any LightningModule; base, task and method come from its `describe()` if it has that method.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        results = trainer.log_dir or trainer.default_root_dir  # communicates, so all processes need it
        if not trainer.is_global_zero:
            return
        describe = getattr(pl_module, "describe", None)
        facts = describe() if callable(describe) else {}
        trainable = trainable_parameters(pl_module)
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        device = trainer.strategy.root_device.type
        lines = {
            "base": facts.get("base", ""),
            "task": facts.get("task", ""),
            "method": facts.get("method", type(pl_module).__name__),
            "trainable": f"{trainable:,} of {total:,} parameters ({100 * trainable / max(total, 1):.3f} %)",
            "precision": f"{trainer.precision} on {trainer.world_size} × {device}",
            "results": results,
        }
        print("\n".join(f"{name + ':':<11}{value}" for name, value in lines.items() if value), flush=True)
