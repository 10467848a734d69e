"""Assign one label to each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.utilities import dim_zero_cat

from lit_peft.tasks.base import Float32Metric, Generation, Mean, Metrics, Task, finite


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
    """

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("classifier", "score", "pre_classifier", "classification_head", "head")
    labelled = True
    extras = ("questions",)
    monitor = ("val_accuracy", "max")

    def metrics(self, config: Any) -> dict[str, Metric]:
        count = config.num_labels
        if count == 1:
            return {"loss": Mean(), "pearson": finite(PearsonCorrCoef)(), "spearman": Spearman()}
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
        if "pearson" in metrics:
            for name in ("pearson", "spearman"):
                metrics[name].update(output.logits.squeeze(-1).float(), batch["labels"].float())
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
        names = model.config.id2label
        if model.config.num_labels == 1:
            return [{"value": value} for value in logits.squeeze(-1).tolist()]
        rows = []
        for row in logits.softmax(-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            probabilities = {str(names[index]): value for index, value in enumerate(row)}
            rows.append({"label": str(names[best]), "score": row[best], "probabilities": probabilities})
        return rows
