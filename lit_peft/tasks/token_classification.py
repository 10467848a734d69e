"""One label per word."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lit_peft.tasks.base import Batch, Metrics, Task, mean
from lit_peft.tasks.tag_spans import SpanScore, count_spans


class TokenClassification(Task):
    """Tagging. Batches: `input_ids`, `attention_mask`, `labels` [batch, length], -100 where a token has no label.

    Metrics: `loss` and `accuracy` over labelled tokens; `precision`, `recall` and `f1` over spans, as seqeval has them.
    Batches of `TokenClassificationData` carry `tags` (the words' gold tags) and `words` (the number of each token's
    word where the token is its first, else -1), so that words that were cut away count as missed. Prediction gives each
    word's tag, None where the word was cut away.
    """

    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    heads = ("classifier", "score", "head")
    labelled = True
    extras = ("tags", "tokens", "words")
    monitor = ("val_f1", "max")

    def __init__(self) -> None:
        self.names: list[str] = []

    def weight(self, batch: Batch) -> Tensor:
        return (batch["labels"] != -100).sum()

    def metrics(self, config: Any) -> dict[str, Metric]:
        self.names = [str(config.id2label[at]) for at in range(config.num_labels)]
        spans = {kind: SpanScore(kind) for kind in ("precision", "recall", "f1")}
        accuracy = MulticlassAccuracy(config.num_labels, average="micro", ignore_index=-100)
        return {"loss": mean(), "accuracy": accuracy, **spans}

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        weight = self.weight(batch)
        metrics["loss"].update(self.loss(output, batch).detach(), weight)
        best, labels = output.logits.argmax(-1), batch["labels"]
        if weight > 0:
            metrics["accuracy"].update(best.flatten(), labels.flatten())
        if "tags" in batch:
            gold = batch["tags"]
            tags = [[tag or "O" for tag in row] for row in self._tags(best, batch["words"], map(len, gold))]
        else:
            gold, tags = [], []
            for numbers, wanted in zip(best.tolist(), labels.tolist(), strict=True):
                kept = [(got, want) for got, want in zip(numbers, wanted, strict=True) if want != -100]
                tags.append([self.names[got] for got, _ in kept])
                gold.append([self.names[want] for _, want in kept])
        counts = count_spans(gold, tags)
        for kind in ("precision", "recall", "f1"):
            metrics[kind].update(*counts)

    def predict(self, module: Any, batch: Batch) -> list[dict[str, Any]]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        best = module(**inputs).logits.argmax(-1)
        if "tokens" not in batch:
            return [{"tags": [self.names[number] for number in row]} for row in best.tolist()]
        rows = self._tags(best, batch["words"], map(len, batch["tokens"]))
        return [{"tokens": tokens, "tags": tags} for tokens, tags in zip(batch["tokens"], rows, strict=True)]

    def _tags(self, best: Tensor, words: Tensor, lengths: Any) -> list[list[str | None]]:
        """The tag of each word of each row; None for words without a token."""
        rows = []
        for numbers, at, length in zip(best.tolist(), words.tolist(), lengths, strict=True):
            tags: list[str | None] = [None] * length
            for number, word in zip(numbers, at, strict=True):
                if word >= 0:
                    tags[word] = self.names[number]
            rows.append(tags)
        return rows
