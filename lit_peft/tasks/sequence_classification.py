"""One label per sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from lit_peft.tasks.base import Metrics, Task, mean


class SequenceClassification(Task):
    """Classification of a text, or of a pair. Batches: `input_ids`, `attention_mask` [batch, length], `labels` [batch].

    Metrics: `loss`, `accuracy`, `f1` (macro average), `mcc`, and with two labels `binary_f1`, that of the second one
    (GLUE's). With one output, the task is regression, `labels` are floats, and the metrics are `loss` (squared error),
    `pearson` and `spearman`. Prediction gives label, score and all probabilities, or the value.
    """

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("classifier", "score", "pre_classifier", "classification_head", "head")
    labelled = True
    monitor = ("val_accuracy", "max")

    def metrics(self, config: Any) -> dict[str, Metric]:
        count = config.num_labels
        if count == 1:
            return {"loss": mean(), "pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()}
        metrics = {
            "loss": mean(),
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "f1": MulticlassF1Score(count, average="macro"),
            "mcc": MulticlassMatthewsCorrCoef(count),
        }
        return {**metrics, "binary_f1": BinaryF1Score()} if count == 2 else metrics

    def update(self, metrics: Metrics, output: Any, batch: dict[str, Tensor]) -> None:
        super().update(metrics, output, batch)
        if "pearson" in metrics:
            for name in ("pearson", "spearman"):
                metrics[name].update(output.logits.squeeze(-1).float(), batch["labels"].float())
            return
        for name in metrics.keys() - {"loss"}:
            metrics[name].update(output.logits.argmax(-1), batch["labels"])

    def predict(self, module: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        names = module.model.config.id2label
        if module.model.config.num_labels == 1:
            return [{"value": value} for value in module(**inputs).logits.float().squeeze(-1).tolist()]
        rows = []
        for row in module(**inputs).logits.float().softmax(-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            probabilities = {str(names[at]): value for at, value in enumerate(row)}
            rows.append({"label": str(names[best]), "score": row[best], "probabilities": probabilities})
        return rows
