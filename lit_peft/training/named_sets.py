"""Metrics of evaluation sets with names: each its own, and those that plain names such as `val_loss` refer to."""

from __future__ import annotations

from typing import Any

import torch

from lit_peft.training.lightning_internals import datamodule_of

_SPLITS = {"val": "validation", "test": "test"}


class NamedSets:
    """Logs the metrics of named sets. A mixin of `BaseLM`.

    A set's metrics end in its name: `val_loss/hard`. The plain names, which checkpoints and early stopping monitor, are
    those of the set that `data.validation_monitor` names, or the mean over all sets.
    """

    task: Any

    def on_validation_epoch_end(self) -> None:
        self._log_monitored_set("val")

    def on_test_epoch_end(self) -> None:
        self._log_monitored_set("test")

    def _log_monitored_set(self, stage: str) -> None:
        module: Any = self
        names = set_names(module, stage)
        if not names:
            return
        choice = getattr(datamodule_of(module), "validation_monitor", None)
        chosen = [names.index(choice)] if choice in names else [0]
        if choice == "mean":
            chosen = list(range(len(names)))
        logged = module.trainer.callback_metrics
        for name in module.val_metrics if stage == "val" else module.test_metrics:
            # Every process computes the same metrics, because computing them gathers.
            if all(f"{stage}_{name}/{names[loader]}" in logged for loader in chosen):
                values = [getattr(module, metrics_attribute(stage, loader))[name].compute() for loader in chosen]
                value = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in values]).mean()
                shown = stage == "val" and name == self.task.monitor[0].removeprefix("val_")
                module.log(f"{stage}_{name}", value, prog_bar=shown, sync_dist=True)


def set_names(module: Any, stage: str) -> list[str]:
    """Return the names of the data's sets for a stage ("val" or "test"), in the order of the loaders; none without."""
    return list(getattr(datamodule_of(module), "sets", {}).get(_SPLITS[stage], ()))


def metrics_attribute(stage: str, loader: int) -> str:
    """Return the name of the attribute with the metrics of a loader."""
    return f"{stage}_metrics" + (f"_{loader}" if loader else "")
