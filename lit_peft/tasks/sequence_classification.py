"""Assign one label to each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.utilities import dim_zero_cat

from lit_peft.tasks.base import Batch, Float32Metric, Generation, Mean, Metrics, Task, finite
from lit_peft.tasks.label_weights import (
    Counts,
    WeightedCrossEntropy,
    Weights,
    check_count,
    check_weights,
    class_weights,
    numbers,
    positive_weights,
    run_without_labels,
)
from lit_peft.tasks.target_metrics import label_metrics, regression_metrics
from lit_peft.util.errors import LitPeftError

# What transformers calls the kinds of problem.
_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_MONITORS = {"multi_label": ("val_micro_f1", "max"), "regression": ("val_pearson", "max")}


class Spearman(Float32Metric, SpearmanCorrCoef):
    """Spearman's rank correlation, with ranks of float32 values."""


class QuestionsRight(Float32Metric):
    """The share of questions, over all batches and processes, with only right rows; 0 if there is no question.

    A process without a row gathers an empty tensor of the type of the others.
    """

    full_state_update = False
    right: list[Tensor]
    questions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "questions"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, right: Tensor, questions: Sequence[int]) -> None:
        """Add rows: whether each is right [batch], and the index of its question."""
        self.right.append(right.to(self.dtype))
        self.questions.append(torch.tensor(questions, dtype=self.dtype, device=right.device))

    def compute(self) -> Tensor:
        right, questions = dim_zero_cat(self.right), dim_zero_cat(self.questions)
        count = questions.unique().numel()
        wrong = questions[right == 0].unique().numel()
        return self.or_nan(torch.tensor(1 - wrong / count if count else 0.0, dtype=self.dtype, device=questions.device))


class SequenceClassification(Task):
    """Classification of a text, or of a pair. Batches: `input_ids`, `attention_mask` [batch, length], `labels` [batch].

    Metrics: `loss`, `accuracy`, `f1` (macro average), `mcc`, and with two labels `binary_f1`, the F1 of the second one
    (as in GLUE, and MultiRC's F1a). If batches have `questions`, the index of the question that each row answers, also
    `exact_match`: the share of questions with only right rows (as in MultiRC). With one output, the task is regression,
    `labels` are floats, and the metrics are `loss` (squared error), `pearson` and `spearman`. Prediction returns label,
    score and all probabilities, or the value.

    With several labels per row (`multi_label`), `labels` are 0 or 1 [batch, labels] and the loss is the binary
    cross-entropy of each label. Metrics: `loss`, `micro_f1`, `macro_f1`, `exact_match` (the share of rows with all
    labels right) and `map` (the mean over labels of the average precision). Prediction returns the `labels` whose
    probability is above `threshold`, and all probabilities. In regression with several targets, `labels` are floats
    [batch, targets], the loss is the mean squared error, and `pearson`, `spearman` and `r2` are means over the targets.

    Args:
        problem_type: `single_label`, `multi_label` or `regression`; unset: what the data says, else `single_label`, or
            `regression` with one output.
        class_weights: a weight in the loss for each class, or `balanced`: so that each class has the same share of it.
        pos_weight: with `multi_label`, the weight of the rows with a label, for each label; or `balanced`: so that they
            count as much as the rows without it.
        label_smoothing: share of the target that is spread over all classes, e.g. 0.1; with `single_label`.
        threshold: with `multi_label`, the probability above which a label is predicted.
    """

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("classifier", "score", "pre_classifier", "classification_head", "head")
    labelled = True
    extras = ("questions",)
    monitor = ("val_accuracy", "max")
    free_settings = ("threshold",)

    def __init__(
        self,
        problem_type: Literal["single_label", "multi_label", "regression"] | None = None,
        class_weights: Weights = None,
        pos_weight: Weights = None,
        label_smoothing: float = 0.0,
        threshold: float = 0.5,
    ) -> None:
        if problem_type not in (None, *_PROBLEM_TYPES):
            raise LitPeftError(
                f"task_args: problem_type={problem_type!r} is not known: use {', '.join(map(repr, _PROBLEM_TYPES))}."
            )
        check_weights("class_weights", class_weights)
        check_weights("pos_weight", pos_weight)
        for name, value in {"label_smoothing": label_smoothing, "threshold": threshold}.items():
            if not 0 <= value < 1:
                raise LitPeftError(f"task_args: {name}={value}: give a number of at least 0 and below 1.")
        self.problem_type: str | None = problem_type
        self.monitor = _MONITORS.get(problem_type or "", self.monitor)
        self.class_weights, self.pos_weight = class_weights, pos_weight
        self.label_smoothing, self.threshold = label_smoothing, float(threshold)

    def learn(self, problem_type: str | None, counts: Counts) -> dict[str, Any]:
        """Take the problem type and balanced weights from the data; see `Task.learn`."""
        own = self.problem_type or "single_label"
        if problem_type not in (None, own) and self.problem_type is not None:
            raise LitPeftError(
                f"task_args: problem_type={self.problem_type!r}, but the data has the labels of {problem_type!r}: "
                "leave problem_type out, or give other data."
            )
        learned: dict[str, Any] = {}
        if self.problem_type is None and problem_type not in (None, "single_label"):
            learned["problem_type"] = self.problem_type = problem_type
            self.monitor = _MONITORS[str(problem_type)]
        if self.class_weights == "balanced" and not self._several:
            learned["class_weights"] = self.class_weights = class_weights(counts()[0])
        if self.pos_weight == "balanced" and self.problem_type == "multi_label":
            learned["pos_weight"] = self.pos_weight = positive_weights(*counts())
        return learned

    @property
    def _several(self) -> bool:
        """Whether a row has several labels or targets."""
        return self.problem_type in ("multi_label", "regression")

    @property
    def _own_loss(self) -> bool:
        """Whether the loss is computed here, and not by the model."""
        return self._several or self.class_weights is not None or self.label_smoothing > 0

    def model_class(self, config: Any) -> Any:
        """As `Task.model_class`; the config gets the problem type, and the settings are checked against it."""
        is_multi = self.problem_type == "multi_label"
        is_regression = self.problem_type == "regression" or (config.num_labels == 1 and not is_multi)
        kind = "multi_label" if is_multi else "regression" if is_regression else "single_label"
        given = {
            "class_weights": self.class_weights is not None and kind != "single_label",
            "label_smoothing": self.label_smoothing > 0 and kind != "single_label",
            "pos_weight": self.pos_weight is not None and not is_multi,
            "threshold": self.threshold != 0.5 and not is_multi,
        }
        unused = next((name for name, value in given.items() if value), None)
        if unused is not None:
            instead = " (pos_weight has)" if unused == "class_weights" and is_multi else ""
            raise LitPeftError(f"task_args: {unused} has no effect with problem_type {kind!r}{instead}: leave it out.")
        if is_multi and config.num_labels < 2:
            raise LitPeftError("task_args: problem_type='multi_label' with one label: give at least two labels.")
        for name in ("class_weights", "pos_weight"):
            check_count(name, getattr(self, name), config.num_labels)
        # A base may have been trained for another problem. If unset, transformers tells it from the labels.
        config.problem_type = None if self.problem_type is None else _PROBLEM_TYPES[self.problem_type]
        return super().model_class(config)

    def run(self, model: Any, batch: Batch) -> Any:
        """Call the model, without the labels if the loss is computed here."""
        if not self._own_loss or "labels" not in batch:
            return super().run(model, batch)
        return run_without_labels(model, batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """As `Task.loss`; in float32 if it is computed here."""
        if not self._own_loss:
            return super().loss(output, batch)
        logits = output.logits.float()
        if self.problem_type == "regression":
            return mse_loss(logits, batch["labels"].float().reshape(logits.shape))
        if self.problem_type == "multi_label":
            weight = numbers("pos_weight", self.pos_weight)
            weight_tensor = None if weight is None else torch.tensor(weight, dtype=logits.dtype, device=logits.device)
            return binary_cross_entropy_with_logits(logits, batch["labels"].float(), pos_weight=weight_tensor)
        return self._weighted(logits, batch["labels"])

    @property
    def _weighted(self) -> WeightedCrossEntropy:
        return WeightedCrossEntropy(numbers("class_weights", self.class_weights), self.label_smoothing)

    def weight(self, batch: Batch) -> Tensor:
        if self.class_weights is None or self._several:
            return super().weight(batch)
        return self._weighted.total(batch["labels"])

    def metrics(self, config: Any) -> dict[str, Metric]:
        count = config.num_labels
        if self.problem_type == "multi_label":
            return {"loss": Mean(), **label_metrics(count, self.threshold)}
        if count == 1:
            return {"loss": Mean(), "pearson": finite(PearsonCorrCoef)(), "spearman": Spearman()}
        if self.problem_type == "regression":
            return {"loss": Mean(), **regression_metrics(count)}
        metrics = {
            "loss": Mean(),
            "accuracy": finite(MulticlassAccuracy)(count, average="micro"),
            "f1": finite(MulticlassF1Score)(count, average="macro"),
            "mcc": finite(MulticlassMatthewsCorrCoef)(count),
            "exact_match": QuestionsRight(),
        }
        return {**metrics, "binary_f1": finite(BinaryF1Score)()} if count == 2 else metrics

    def update(self, metrics: Metrics, output: Any, batch: dict[str, Tensor]) -> None:
        super().update(metrics, output, batch)
        logits, labels = output.logits.float(), batch["labels"]
        if "pearson" in metrics:
            for name in metrics.keys() - {"loss"}:
                metrics[name].update(logits.squeeze(-1), labels.float().reshape(logits.squeeze(-1).shape))
            return
        if "map" in metrics:
            for name in metrics.keys() - {"loss"}:
                metrics[name].update(logits.sigmoid(), labels.int())
            return
        predicted = output.logits.argmax(-1)
        for name in metrics.keys() - {"loss", "exact_match"}:
            metrics[name].update(predicted, batch["labels"])
        if "questions" in batch:
            metrics["exact_match"].update(predicted == batch["labels"], batch["questions"])

    def float32_loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor | None:
        logits, labels = output.logits.float(), batch["labels"]
        if logits.shape[-1] == 1:
            return mse_loss(logits.squeeze(-1), labels.float())
        return None if labels.is_floating_point() else cross_entropy(logits, labels)

    def predict(self, model: Any, batch: dict[str, Tensor], generation: Generation) -> list[dict[str, Any]]:
        logits = self.forward(model, {name: value for name, value in batch.items() if name != "labels"}).logits.float()
        names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        if self.problem_type == "multi_label":
            return [self._above(dict(zip(names, row, strict=True))) for row in logits.sigmoid().tolist()]
        if model.config.num_labels == 1:
            return [{"value": value} for value in logits.squeeze(-1).tolist()]
        if self.problem_type == "regression":
            return [{"values": dict(zip(names, row, strict=True))} for row in logits.tolist()]
        rows = []
        for row in logits.softmax(-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            rows.append({"label": names[best], "score": row[best], "probabilities": dict(zip(names, row, strict=True))})
        return rows

    def _above(self, probabilities: dict[str, float]) -> dict[str, Any]:
        labels = [name for name, value in probabilities.items() if value > self.threshold]
        return {"labels": labels, "probabilities": probabilities}
