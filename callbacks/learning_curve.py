"""Draw the metrics of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_peft.util.errors import LitPeftError


class LearningCurve(Callback):
    """Draws every logged metric over the steps as a PNG when training ends or fails.

    There is one panel for the losses and one for the other metrics. The curve of a resumed run is complete.

    Args:
        filename: name of the picture in the run's folder, or a path.
        metrics: first letters of the names to draw, e.g. `[train_loss, val]`; all metrics if unset.
        every_n_steps: optimizer steps between the points of metrics logged in training; the Trainer's
            `log_every_n_steps` if unset.

    Attributes:
        points: pairs of step and value, by metric.

    Raises:
        LitPeftError: matplotlib is not installed.
    """

    def __init__(
        self, filename: str = "learning_curve.png", metrics: list[str] | None = None, every_n_steps: int | None = None
    ) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise LitPeftError("LearningCurve needs matplotlib, which is not installed: pip install 'lit-peft[plots]'.")
        self.filename, self.metrics, self.every_n_steps = filename, metrics, every_n_steps
        self.points: dict[str, list[tuple[int, float]]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        every = self.every_n_steps or max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 or trainer.global_step == 1:
            self._add_points(trainer, trainer.progress_bar_metrics | trainer.logged_metrics, validated=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._add_points(trainer, trainer.callback_metrics, validated=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._draw(trainer)

    def _add_points(self, trainer: pl.Trainer, values: Any, validated: bool) -> None:
        for name, value in values.items():
            selected = self.metrics is None or name.startswith(tuple(self.metrics))
            if not selected or name in ("epoch", "v_num") or name.startswith("val") != validated:
                continue
            points = self.points.setdefault(name, [])
            if not points or points[-1][0] != trainer.global_step:
                points.append((trainer.global_step, float(value)))

    def _draw(self, trainer: pl.Trainer) -> None:
        if not self.points or not trainer.is_global_zero:
            return
        from matplotlib.figure import Figure

        panels = [
            {name: points for name, points in self.points.items() if ("loss" in name) is is_loss}
            for is_loss in (True, False)
        ]
        panels = [panel for panel in panels if panel]
        figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            for name, points in sorted(panel.items()):
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=name, marker="o" if len(points) < 30 else None, markersize=3)
            axes.legend(frameon=False)
            axes.grid(alpha=0.3)
            axes.set_xlabel("step")
        path = Path(trainer.log_dir or trainer.default_root_dir) / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = {
            name: [(int(step), float(value)) for step, value in p] for name, p in state_dict["points"].items()
        }
