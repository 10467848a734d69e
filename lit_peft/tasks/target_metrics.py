"""Metrics of several numbers or several labels per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelExactMatch, MultilabelF1Score
from torchmetrics.regression import PearsonCorrCoef, R2Score, SpearmanCorrCoef

from lit_peft.tasks.base import Float32Metric, finite


class _MeanOverTargets(Float32Metric):
    """A mixin of metrics with a value for each target: their mean."""

    def compute(self) -> Tensor:
        return super().compute().mean()


class _MeanPearson(_MeanOverTargets, PearsonCorrCoef):
    pass


class _MeanSpearman(_MeanOverTargets, SpearmanCorrCoef):
    pass


class _MeanR2(Float32Metric, R2Score):
    """R² as a mean over the targets; NaN for fewer than two rows, of which it is not defined."""

    def compute(self) -> Tensor:
        if self.total < 2:
            return torch.full((), float("nan"), device=self.total.device)
        return super().compute()


def regression_metrics(targets: int) -> dict[str, Metric]:
    """Return metrics of several targets; each is updated with predictions and targets [batch, targets], float32."""
    return {
        "pearson": _MeanPearson(num_outputs=targets),
        "spearman": _MeanSpearman(num_outputs=targets),
        "r2": _MeanR2(),
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
        "map": finite(MultilabelAveragePrecision)(labels, average="macro"),
    }
