"""Find the span of a text that answers a question."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task, float32_default
from lit_peft.tasks.squad import best_over, exact_match, find_answer, token_f1


class QuestionAnswering(Task):
    """Extractive question answering. Batches: `input_ids`, `attention_mask` [windows, length] and, for the loss,
    `start_positions`, `end_positions` [windows].

    To evaluate and predict, batches have all windows of each question, and how to read them: `windows` [questions], the
    number of windows of each, `offsets` [windows, length, 2], `nulls` [windows], `search` (settings of `find_answer`),
    and for each question `ids` (optional), `contexts` and, except for prediction, `answers`. Metrics: `loss` over
    windows; `exact_match` and `f1` over questions, normalized as in SQuAD. Prediction returns id, answer (empty: none)
    and score.
    """

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    heads = ("qa_outputs", "classifier", "head")
    extras = ("windows", "offsets", "nulls", "search", "ids", "contexts", "answers")
    monitor = ("val_f1", "max")

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {name: Mean() for name in ("loss", "exact_match", "f1")}

    def evaluate(self, model: Any, metrics: Metrics, batch: Batch, generation: Generation) -> None:
        if "windows" not in batch:
            super().evaluate(model, metrics, batch, generation)
            return
        output = self._run_in_parts(model, batch)
        rows = self._answers(output, batch)
        with float32_default():
            metrics["loss"].update(output.loss.detach(), len(batch["input_ids"]))
            for row, golds in zip(rows, batch["answers"], strict=True):
                metrics["exact_match"].update(best_over(exact_match, row["answer"], golds))
                metrics["f1"].update(best_over(token_f1, row["answer"], golds))

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        rows = self._answers(self._run_in_parts(model, batch), batch)
        return [{"id": name, **row} for name, row in zip(batch["ids"], rows, strict=True)] if "ids" in batch else rows

    def float32_loss(self, output: Any, batch: Batch) -> torch.Tensor | None:
        ends = (output.start_logits, batch["start_positions"]), (output.end_logits, batch["end_positions"])
        # As in transformers: positions after the end are ignored.
        losses = [
            cross_entropy(logits.float(), positions.clamp(0, logits.shape[1]), ignore_index=logits.shape[1])
            for logits, positions in ends
        ]
        return (losses[0] + losses[1]) / 2

    def _run_in_parts(self, model: Any, batch: Batch) -> Any:
        """Run as many windows at a time as there are questions, so that long texts need no more memory."""
        size, count = len(batch["windows"]), len(batch["input_ids"])
        inputs = {name: value for name, value in batch.items() if name not in self.extras}
        starts, ends, losses = [], [], torch.zeros(count, dtype=torch.float32)
        for first in range(0, count, size):
            part = {name: value[first : first + size] for name, value in inputs.items()}
            output = self.forward(model, part)
            starts.append(output.start_logits)
            ends.append(output.end_logits)
            if output.loss is not None:
                losses[first : first + size] = self.precise_loss(output, part)
        return SimpleNamespace(start_logits=torch.cat(starts), end_logits=torch.cat(ends), loss=losses.mean())

    def _answers(self, output: Any, batch: Batch) -> list[dict[str, Any]]:
        sizes = batch["windows"].tolist()
        parts = zip(
            *(
                value.cpu().split(sizes)
                for value in (output.start_logits, output.end_logits, batch["offsets"], batch["nulls"])
            ),
            batch["contexts"],
            strict=True,
        )
        rows = []
        for starts, ends, offsets, nulls, context in parts:
            found = find_answer(starts, ends, offsets, nulls, **batch["search"])
            rows.append({"answer": context[found.start : found.end], "score": found.score})
        return rows
