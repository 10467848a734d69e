"""One label per sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lit_peft.tasks.base import Metrics, Task


class SequenceClassification(Task):
    """Classification of a text, or of a pair. Batches: `input_ids`, `attention_mask` [batch, length], `labels` [batch].

    Metrics: `loss`, `accuracy` and `f1` (macro average). Prediction gives label, score and all probabilities.
    """

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("classifier", "score", "pre_classifier", "classification_head", "head")
    labelled = True
    monitor = ("val_accuracy", "max")

    def metrics(self, num_labels: int) -> dict[str, Metric]:
        return {
            "loss": MeanMetric(),
            "accuracy": MulticlassAccuracy(num_labels, average="micro"),
            "f1": MulticlassF1Score(num_labels, average="macro"),
        }

    def update(self, metrics: Metrics, output: Any, batch: dict[str, Tensor]) -> None:
        super().update(metrics, output, batch)
        for name in ("accuracy", "f1"):
            metrics[name].update(output.logits, batch["labels"])

    def predict(self, module: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        names = module.model.config.id2label
        rows = []
        for row in module(**inputs).logits.float().softmax(-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            probabilities = {str(names[at]): value for at, value in enumerate(row)}
            rows.append({"label": str(names[best]), "score": row[best], "probabilities": probabilities})
        return rows
