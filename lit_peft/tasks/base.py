"""What a task is to the base LM."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lit_peft.util.errors import LitPeftError

Metrics = Mapping[str, Any]
Batch = dict[str, Any]


def mean() -> MeanMetric:
    """A mean that says so when a value is NaN, rather than to leave it out."""
    # Put in its own place: the strategy "disable" would leave the weights out as well.
    return MeanMetric(nan_strategy=float("nan"))


class Task:
    """The head, loss and metrics of one kind of problem.

    Attributes:
        name: how the user calls it.
        auto_class: the transformers class that builds the model with this head.
        heads: names of the head's modules over all architectures; those a model has are trained in full.
        labelled: whether the head has one output per label.
        new_head: whether the head may be a new one, which the base has no weights for.
        extras: keys of a batch that are not for the model, but for metrics and predictions.
        monitor: the metric that tells the best checkpoint, and "min" or "max".
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ()
    labelled: ClassVar[bool] = False
    new_head: ClassVar[bool] = True
    extras: ClassVar[tuple[str, ...]] = ()
    monitor: tuple[str, str] = ("val_loss", "min")

    def model_class(self, config: Any) -> Any:
        """Return the auto class that builds a model of this config for the task.

        Raises:
            LitPeftError: transformers has no such model.
        """
        import transformers

        auto = getattr(transformers, self.auto_class)
        if type(config) in auto._model_mapping or self.auto_class in (getattr(config, "auto_map", None) or {}):
            return auto
        kind = self.auto_class.removeprefix("AutoModelFor")
        raise LitPeftError(
            f"task={self.name!r} needs a {kind} model, and transformers has none of model_type={config.model_type!r}: "
            "choose another base or another task."
        )

    def run(self, model: Any, batch: Batch) -> Any:
        """Call the model on a batch without its extras."""
        return model(**batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar: zero, with a gradient of zero, where nothing is supervised."""
        loss: Tensor = output.loss
        logits = getattr(output, "logits", None)
        if logits is not None and self.weight(batch) == 0:
            # The models' own is 0/0, whose gradient would spoil every weight.
            return logits.float().sum() * 0.0
        return loss

    def loss_alone(self, model: Any) -> AbstractContextManager[None]:
        """A context in which the model computes its loss, and perhaps no more than that."""
        return nullcontext()

    def weight(self, batch: Batch) -> Tensor:
        """Return how many terms the batch's mean loss is over, a scalar."""
        import torch

        return torch.tensor(len(next(iter(batch.values()))))

    def metrics(self, config: Any) -> dict[str, Metric]:
        """Return fresh metrics by name, of a model with this config; every task has at least `loss`."""
        return {"loss": mean()}

    def evaluate(self, module: Any, metrics: Metrics, batch: Batch) -> list[dict[str, Any]] | None:
        """Run the module on a batch and add it to the metrics.

        Returns:
            One plain dict per example where the task judges what it generates; else None.
        """
        self.update(metrics, module(**batch), batch)
        return None

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""
        metrics["loss"].update(self.loss(output, batch).detach(), self.weight(batch))

    def predict(self, module: Any, batch: Batch) -> list[dict[str, Any]]:
        """Return one plain dict per example of the batch."""
        raise NotImplementedError
