"""Choose the right one of several answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from lit_peft.models.transformers_internals import has_model_class
from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task
from lit_peft.tasks.squad import best_over, exact_match, token_f1


class MultipleChoice(Task):
    """Each choice is scored together with its question; softmax over the choices of a question.

    Batches: `input_ids`, `attention_mask` [batch, choices, length]; or, if questions differ in their number of choices,
    all choices as rows [rows, length] and `choices` [batch], the number of choices of each question. `labels` [batch],
    the right choice; or [batch, most choices], bool, if several are right: the loss is that of choosing any of them.
    Models without a multiple-choice head in transformers get an equal one: a classification head with one output.

    Metrics: `loss` and `accuracy`; if batches have the `texts` of the choices and the right `answers`, also
    `exact_match` and `f1` of the chosen text, the best over all answers, normalized as in SQuAD and ReCoRD. Prediction
    returns the index of the choice (from 0), its text and all probabilities.
    """

    name = "multiple_choice"
    auto_class = "AutoModelForMultipleChoice"
    heads = ("classifier", "pre_classifier", "sequence_summary", "pooler", "head", "score", "classification_head")
    extras = ("texts", "answers")
    monitor = ("val_accuracy", "max")

    def model_class(self, config: Any) -> Any:
        """Return the multiple-choice class, or else the classification class, with one output."""
        import transformers

        classifier = "AutoModelForSequenceClassification"
        if not has_model_class(self.auto_class, config) and has_model_class(classifier, config):
            config.num_labels = 1
            return getattr(transformers, classifier)
        return super().model_class(config)

    def run(self, model: Any, batch: Batch) -> Any:
        """Return `logits` [batch, most choices], -inf beyond a question's choices, and with labels `loss`."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "choices")}
        ids = inputs["input_ids"]
        counts = batch.get("choices")
        if counts is None:
            counts = torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
            inputs = {name: value.flatten(0, 1) for name, value in inputs.items()}
        if has_model_class(self.auto_class, model.config):
            # Rows of one choice each, which the head scores one by one.
            inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
        scores = model(**inputs).logits.flatten().float()
        exists = torch.arange(int(counts.max()), device=ids.device) < counts[:, None]
        logits = scores.new_full(exists.shape, float("-inf")).masked_scatter(exists, scores)
        output = SimpleNamespace(logits=logits, loss=None)
        labels = batch.get("labels")
        if labels is not None and labels.dim() == 2:
            right = logits.masked_fill(~labels, float("-inf"))
            output.loss = (logits.logsumexp(-1) - right.logsumexp(-1)).mean()
        elif labels is not None:
            output.loss = cross_entropy(logits, labels)
        return output

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {name: Mean() for name in ("loss", "accuracy", "exact_match", "f1")}

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        super().update(metrics, output, batch)
        chosen, labels = output.logits.argmax(-1), batch["labels"]
        right = chosen == labels if labels.dim() == 1 else labels.gather(1, chosen[:, None])
        metrics["accuracy"].update(right.float())
        for index, texts, golds in zip(chosen.tolist(), batch.get("texts", ()), batch.get("answers", ()), strict=False):
            metrics["exact_match"].update(best_over(exact_match, texts[index], golds))
            metrics["f1"].update(best_over(token_f1, texts[index], golds))

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.forward(model, inputs).logits
        rows = []
        for index, row in enumerate(logits):
            probabilities = row[row > float("-inf")].softmax(-1).tolist()
            best = int(row.argmax())
            text = {"text": batch["texts"][index][best]} if "texts" in batch else {}
            rows.append({"choice": best, **text, "score": probabilities[best], "probabilities": probabilities})
        return rows
