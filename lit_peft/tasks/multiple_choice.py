"""The right one of several answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from lit_peft.tasks.base import Batch, Metrics, Task, mean


class MultipleChoice(Task):
    """Each choice is scored with its question; softmax over a question's choices.

    Batches: `input_ids`, `attention_mask` [batch, choices, length]; or, where questions differ in their number of
    choices, all choices as rows [rows, length] and `choices` [batch], how many each question has. `labels` [batch].
    Models without a multiple-choice head in transformers get the same one: a classification head with one output.

    Metrics: `loss` and `accuracy`. Prediction gives the number of the choice (from 0), its text and all probabilities.
    """

    name = "multiple_choice"
    auto_class = "AutoModelForMultipleChoice"
    heads = ("classifier", "pre_classifier", "sequence_summary", "pooler", "head", "score", "classification_head")
    extras = ("texts",)
    monitor = ("val_accuracy", "max")

    def model_class(self, config: Any) -> Any:
        """The multiple-choice class, or else that of classification, with one output."""
        import transformers

        if type(config) in transformers.AutoModelForMultipleChoice._model_mapping:
            return transformers.AutoModelForMultipleChoice
        if type(config) in transformers.AutoModelForSequenceClassification._model_mapping:
            config.num_labels = 1
            return transformers.AutoModelForSequenceClassification
        return super().model_class(config)

    def run(self, model: Any, batch: Batch) -> Any:
        """Return `logits` [batch, most choices], -inf where a question has no such choice, and with labels `loss`."""
        import transformers

        inputs = {name: value for name, value in batch.items() if name not in ("labels", "choices")}
        ids = inputs["input_ids"]
        counts = batch.get("choices")
        if counts is None:
            counts = torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
            inputs = {name: value.flatten(0, 1) for name, value in inputs.items()}
        if type(model.config) in transformers.AutoModelForMultipleChoice._model_mapping:
            # Rows of one choice each, which its head scores one by one.
            inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
        scores = model(**inputs).logits.flatten().float()
        there = torch.arange(int(counts.max()), device=ids.device) < counts[:, None]
        logits = scores.new_full(there.shape, float("-inf")).masked_scatter(there, scores)
        output = SimpleNamespace(logits=logits, loss=None)
        if "labels" in batch:
            output.loss = cross_entropy(logits, batch["labels"])
        return output

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {"loss": mean(), "accuracy": mean()}

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        super().update(metrics, output, batch)
        metrics["accuracy"].update((output.logits.argmax(-1) == batch["labels"]).float())

    def predict(self, module: Any, batch: Batch) -> list[dict[str, Any]]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = module(**inputs).logits
        rows = []
        for number, row in enumerate(logits):
            probabilities = row[row > float("-inf")].softmax(-1).tolist()
            best = int(row.argmax())
            text = {"text": batch["texts"][number][best]} if "texts" in batch else {}
            rows.append({"choice": best, **text, "score": probabilities[best], "probabilities": probabilities})
        return rows
