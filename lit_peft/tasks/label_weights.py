"""Weights of classes and labels in the loss, as numbers or `balanced` from the training rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_peft.models.call_arguments import arguments
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

Weights = list[float] | Literal["balanced"] | None
"""The type of these settings."""

Counts = Callable[[], tuple[list[int], int]]
"""Returns how many training rows (or words) have each label, and how many there are."""


def check_weights(name: str, weights: Weights) -> None:
    """Check a setting of weights.

    Raises:
        LitPeftError: it is a word other than `balanced`, or has negative numbers, or zeros only.
    """
    if weights is None or weights == "balanced":
        return
    if isinstance(weights, str) or min(weights, default=-1) < 0 or not max(weights, default=0) > 0:
        raise LitPeftError(
            f"task_args: {name}={brief(weights)}: give 'balanced', or a number of at least 0 for each label, in the "
            "order of the labels."
        )


def check_count(name: str, weights: Weights, labels: int) -> None:
    """Check that there is one weight for each label.

    Raises:
        LitPeftError: there are more or fewer.
    """
    if weights is not None and weights != "balanced" and len(weights) != labels:
        raise LitPeftError(
            f"task_args: {name} has {len(weights)} numbers, and there are {labels} labels: give one for each, in the "
            "order of the labels."
        )


def class_weights(counts: Sequence[int]) -> list[float]:
    """Return weights that give each class the same share of the loss: rows / (classes * rows of the class).

    Raises:
        LitPeftError: a class has no row.
    """
    _check_all_occur("class_weights", counts)
    return [sum(counts) / (len(counts) * count) for count in counts]


def positive_weights(counts: Sequence[int], rows: int) -> list[float]:
    """Return weights that give the rows with a label the same share of its loss as those without: without / with.

    Raises:
        LitPeftError: a label is in no row, or in every row.
    """
    _check_all_occur("pos_weight", counts)
    if rows in counts:
        raise LitPeftError(
            f"task_args: pos_weight='balanced', but every training row has the label with the index "
            f"{counts.index(rows)}, which would get the weight 0: leave the label out, or give the weights as a list."
        )
    return [(rows - count) / count for count in counts]


def _check_all_occur(name: str, counts: Sequence[int]) -> None:
    missing = [index for index, count in enumerate(counts) if not count]
    if missing:
        raise LitPeftError(
            f"task_args: {name}='balanced', but no training row has the label with the index {missing[0]}: give the "
            "weights as a list."
        )


def numbers(name: str, weights: Weights) -> list[float] | None:
    """Return weights as numbers; None if there are none.

    Raises:
        LitPeftError: they are still to be taken from the data.
    """
    if weights == "balanced":
        raise LitPeftError(
            f"task_args: {name}='balanced' needs the labels of the training rows: give data.train, or the weights as a "
            "list."
        )
    return None if weights is None else list(map(float, weights))


def run_without_labels(model: Any, batch: Mapping[str, Any]) -> Any:
    """Call a model whose loss is computed elsewhere."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**({"use_cache": False} if "use_cache" in arguments(model) else {}), **inputs)


class WeightedCrossEntropy:
    """Cross-entropy with a weight for each class and label smoothing, as `torch.nn.functional.cross_entropy`.

    Args:
        weights: the weights; None: all are 1.
        smoothing: the share of the target that all classes have in common.
    """

    def __init__(self, weights: list[float] | None, smoothing: float = 0.0) -> None:
        # The mean does not depend on their scale. Where any row counts, the sum of a batch is then at least 1.
        least = min((weight for weight in weights or () if weight > 0), default=1.0)
        self.weights = None if weights is None else [weight / least for weight in weights]
        self.smoothing = smoothing

    def total(self, labels: Tensor) -> Tensor:
        """Return the sum of the weights of labels, a scalar; those of -100 are 0."""
        known = labels[labels != -100]
        return torch.tensor(known.numel()) if self.weights is None else self._tensor(labels)[known].sum()

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted mean in float32; zero, with a gradient of zero, if no row counts.

        Args:
            logits: [..., classes].
            labels: [...], -100 for those that do not count.
        """
        logits, labels = logits.float().flatten(0, -2), labels.flatten()
        weights = None if self.weights is None else self._tensor(labels)
        loss = cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=self.smoothing)
        total = self.total(labels).to(loss.device)
        return loss / torch.where(total > 0, total, math.inf)

    def _tensor(self, labels: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float32, device=labels.device)
