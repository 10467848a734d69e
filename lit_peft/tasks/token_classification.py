"""Assign one label to each word."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task, finite
from lit_peft.tasks.label_weights import (
    Counts,
    WeightedCrossEntropy,
    Weights,
    check_count,
    check_weights,
    class_weights,
    numbers,
    run_without_labels,
)
from lit_peft.tasks.tag_spans import SpanScore, count_spans


class TokenClassification(Task):
    """Tagging. Batches: `input_ids`, `attention_mask`, `labels` [batch, length], -100 for tokens without a label.

    Metrics: `loss` and `accuracy` over labelled tokens; `precision`, `recall` and `f1` over spans, as in seqeval.
    Batches of `TokenClassificationData` have `tags` (the words' gold tags) and `words` (for the first token of a word
    the index of the word, else -1), so that words that were cut off count as missed. Prediction returns the tag of each
    word, None for words that were cut off.

    Args:
        class_weights: a weight in the loss for each tag, or `balanced`: so that each tag has the same share of it.
    """

    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    heads = ("classifier", "score", "head")
    labelled = True
    extras = ("tags", "tokens", "words")
    monitor = ("val_f1", "max")

    def __init__(self, class_weights: Weights = None) -> None:
        check_weights("class_weights", class_weights)
        self.class_weights = class_weights
        self.names: list[str] = []

    def learn(self, problem_type: str | None, counts: Counts) -> dict[str, Any]:
        """Take balanced weights from the data; see `Task.learn`."""
        if self.class_weights != "balanced":
            return {}
        self.class_weights = class_weights(counts()[0])
        return {"class_weights": self.class_weights}

    def model_class(self, config: Any) -> Any:
        """As `Task.model_class`; there must be a weight for each tag."""
        check_count("class_weights", self.class_weights, config.num_labels)
        return super().model_class(config)

    @property
    def _weighted(self) -> WeightedCrossEntropy:
        return WeightedCrossEntropy(numbers("class_weights", self.class_weights))

    def run(self, model: Any, batch: Batch) -> Any:
        """Call the model, without the labels if the loss is computed here."""
        return super().run(model, batch) if self.class_weights is None else run_without_labels(model, batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """As `Task.loss`; in float32 with class weights."""
        if self.class_weights is None:
            return super().loss(output, batch)
        return self._weighted(output.logits, batch["labels"])

    def weight(self, batch: Batch) -> Tensor:
        if self.class_weights is not None:
            return self._weighted.total(batch["labels"])
        return (batch["labels"] != -100).sum()

    def metrics(self, config: Any) -> dict[str, Metric]:
        self.names = [str(config.id2label[index]) for index in range(config.num_labels)]
        spans = {kind: SpanScore(kind) for kind in ("precision", "recall", "f1")}
        accuracy = finite(MulticlassAccuracy)(config.num_labels, average="micro", ignore_index=-100)
        return {"loss": Mean(), "accuracy": accuracy, **spans}

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        weight = self.weight(batch)
        metrics["loss"].update(self.precise_loss(output, batch), weight)
        best, labels = output.logits.argmax(-1), batch["labels"]
        if weight > 0:
            metrics["accuracy"].update(best.flatten(), labels.flatten())
        if "tags" in batch:
            gold = batch["tags"]
            tags = [[tag or "O" for tag in row] for row in self._tags(best, batch["words"], map(len, gold))]
        else:
            gold, tags = [], []
            for predicted, expected in zip(best.tolist(), labels.tolist(), strict=True):
                pairs = [pair for pair in zip(predicted, expected, strict=True) if pair[1] != -100]
                tags.append([self.names[label] for label, _ in pairs])
                gold.append([self.names[label] for _, label in pairs])
        counts = count_spans(gold, tags)
        for kind in ("precision", "recall", "f1"):
            metrics[kind].update(*counts)

    def float32_loss(self, output: Any, batch: Batch) -> Tensor | None:
        return cross_entropy(output.logits.float().flatten(0, -2), batch["labels"].flatten())

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        best = self.forward(model, inputs).logits.argmax(-1)
        if "tokens" not in batch:
            return [{"tags": [self.names[label] for label in row]} for row in best.tolist()]
        rows = self._tags(best, batch["words"], map(len, batch["tokens"]))
        return [{"tokens": tokens, "tags": tags} for tokens, tags in zip(batch["tokens"], rows, strict=True)]

    def _tags(self, best: Tensor, words: Tensor, lengths: Any) -> list[list[str | None]]:
        """Return the tag of each word of each row; None for words without a token."""
        rows = []
        for labels, word_indices, length in zip(best.tolist(), words.tolist(), lengths, strict=True):
            tags: list[str | None] = [None] * length
            for label, word in zip(labels, word_indices, strict=True):
                if word >= 0:
                    tags[word] = self.names[label]
            rows.append(tags)
        return rows
