"""Metrics of several numbers or several labels per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.functional.regression import spearman_corrcoef
from torchmetrics.regression import PearsonCorrCoef, R2Score
from torchmetrics.utilities import dim_zero_cat

from lit_peft.tasks.base import Float32Metric, finite


class _MeanPearson(Float32Metric, PearsonCorrCoef):
    """Pearson's correlation as a mean over the targets."""

    def compute(self) -> Tensor:
        return super().compute().mean()


class _MeanR2(Float32Metric, R2Score):
    """R² as a mean over the targets; NaN for fewer than two rows, of which it is not defined."""

    def __init__(self, targets: int) -> None:
        super().__init__()
        # The shape that updates give them, because a process may have no row.
        for name in ("sum_squared_error", "sum_error", "residual"):
            self.add_state(name, torch.zeros(targets), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        if self.total < 2:
            return torch.full((), float("nan"), device=self.total.device)
        return super().compute()


class _OfAllRows(Float32Metric):
    """The mean over columns of a metric that is computed from all rows; they are kept.

    Args:
        columns: the number of columns.
        score: the metric, given predictions and targets [rows, columns].
    """

    full_state_update = False
    predictions: list[Tensor]
    targets: list[Tensor]

    def __init__(self, columns: int, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.columns, self.score = columns, score
        # Flat, because a process without a row gathers an empty tensor of one dimension.
        for name in ("predictions", "targets"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add rows: predictions and targets [rows, columns]."""
        self.predictions.append(predictions.flatten().to(self.dtype))
        self.targets.append(targets.flatten().to(self.dtype))

    def compute(self) -> Tensor:
        shape = (-1, self.columns)
        rows = dim_zero_cat(self.predictions).view(shape), dim_zero_cat(self.targets).view(shape)
        return self.or_nan(self.score(*rows).mean())


def _average_precision(probabilities: Tensor, labels: Tensor) -> Tensor:
    return multilabel_average_precision(probabilities, labels.int(), labels.shape[1], average="macro")


def regression_metrics(targets: int) -> dict[str, Metric]:
    """Return metrics of several targets; each is updated with predictions and targets [batch, targets], float32."""
    return {
        "pearson": _MeanPearson(num_outputs=targets),
        "spearman": _OfAllRows(targets, spearman_corrcoef),
        "r2": _MeanR2(targets),
    }


def label_metrics(labels: int, threshold: float) -> dict[str, Metric]:
    """Return metrics of several labels per row; each is updated with probabilities and 0/1 [batch, labels].

    Args:
        labels: the number of labels.
        threshold: a label is predicted if its probability is above.
    """
    f1, exact = finite(MultilabelF1Score), finite(MultilabelExactMatch)
    return {
        "micro_f1": f1(labels, threshold, average="micro"),
        "macro_f1": f1(labels, threshold, average="macro"),
        "exact_match": exact(labels, threshold),
        "map": _OfAllRows(labels, _average_precision),
    }
