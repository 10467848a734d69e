"""What a task is to the base LM."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import MeanMetric, Metric

Metrics = Mapping[str, Any]


class Task:
    """The head, loss and metrics of one kind of problem.

    Attributes:
        name: how the user calls it.
        auto_class: the transformers class that builds the model with this head.
        heads: names of the head's modules over all architectures; those a model has are trained in full.
        labelled: whether the head has one output per label.
        causal: whether each token sees only those before it.
        monitor: the metric that tells the best checkpoint, and "min" or "max".
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ()
    labelled: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    monitor: ClassVar[tuple[str, str]] = ("val_loss", "min")

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        loss: Tensor = output.loss
        return loss

    def loss_alone(self, model: Any) -> AbstractContextManager[None]:
        """A context in which the model computes its loss, and perhaps no more than that."""
        return nullcontext()

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """Return how many terms the batch's mean loss is over, a scalar."""
        import torch

        return torch.tensor(len(next(iter(batch.values()))))

    def metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return fresh metrics by name; every task has at least `loss`."""
        return {"loss": MeanMetric()}

    def update(self, metrics: Metrics, output: Any, batch: dict[str, Tensor]) -> None:
        """Add a batch to the metrics."""
        metrics["loss"].update(self.loss(output, batch).detach(), self.weight(batch))

    def predict(self, module: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Return one plain dict per example of the batch."""
        raise NotImplementedError
