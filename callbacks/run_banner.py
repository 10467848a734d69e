"""Print what will be trained, in a few lines."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lit_peft.callbacks.last_checkpoint import LastCheckpoint

from lit_peft.data.loaders import default_workers
from lit_peft.methods.attachment import trainable_parameters
from lit_peft.models.experts import experts_adapted, experts_left_out
from lit_peft.models.precision_note import precision_note
from lit_peft.models.towers import describe_towers


class RunBanner(Callback):
    """Prints what is trained, how long, in which precision and on which devices, when fitting starts.

    In every stage, it also prints what a data module with a `report()` lost of the data.

    Works with any LightningModule; base, task and method come from its `describe()` if it has that method.

    Args:
        length_note: text to print after the number of epochs and steps.
    """

    def __init__(self, length_note: str = "") -> None:
        self.length_note = length_note

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
            "towers": describe_towers(pl_module),
            "experts": "; ".join(filter(None, (experts_adapted(pl_module), experts_left_out(pl_module)))),
            "quantized": precision_note(pl_module) or "",
            "trainable": f"{trainable:,} of {total:,} parameters ({100 * trainable / max(total, 1):.3f} %)",
            "length": _length(trainer) + (f" ({self.length_note})" if self.length_note else ""),
            "precision": f"{trainer.precision} on {trainer.world_size} × {device}",
            "GPU": _on_gpu(trainer),
            "results": results,
            "last.ckpt": next(
                (c.describe() for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), ""
            ),
        }
        print("\n".join(f"{name + ':':<11}{value}" for name, value in lines.items() if value), flush=True)
        print_data_report(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            print_data_report(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print_data_report(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print_data_report(trainer)


def print_data_report(trainer: pl.Trainer) -> None:
    """Print what the data module cut, dropped or ignored, on the first process."""
    report = getattr(getattr(trainer, "datamodule", None), "report", None)
    if trainer.is_global_zero and callable(report):
        for line in report():
            print(f"{'data:':<11}{line}", flush=True)


def _on_gpu(trainer: pl.Trainer) -> str:
    """Return what is done in another way than on a CPU, in words; empty on a CPU."""
    if trainer.strategy.root_device.type != "cuda":
        return ""
    fused = [type(o).__name__ for o in trainer.optimizers if any(group.get("fused") for group in o.param_groups)]
    data = getattr(trainer, "datamodule", None)
    workers = getattr(data, "num_workers", 0)
    if workers is None:  # a stream gets none
        workers = 0 if getattr(data, "streaming", False) else default_workers(trainer)
    parts = [*(f"fused {name}" for name in fused), f"batches by {workers} processes" if workers else ""]
    return ", ".join(filter(None, parts))


def _length(trainer: pl.Trainer) -> str:
    """Return how long training lasts, in words."""
    epochs = trainer.max_epochs
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # gradients are accumulated over a changing number of batches
        steps = math.inf
    parts = [] if epochs is None or epochs < 0 else [f"{epochs} epoch{'' if epochs == 1 else 's'}"]
    parts += [f"{steps:,} steps"] if math.isfinite(steps) else []
    return ", ".join(parts) or "until it is stopped"
