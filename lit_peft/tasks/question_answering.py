"""The span of a text that answers a question."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torchmetrics import Metric

from lit_peft.tasks.base import Batch, Metrics, Task, mean
from lit_peft.tasks.squad import best_over, exact_match, find_answer, token_f1


class QuestionAnswering(Task):
    """Extractive question answering. Batches: `input_ids`, `attention_mask` [windows, length] and, for the loss,
    `start_positions`, `end_positions` [windows].

    To evaluate and predict, batches hold all windows of each question, and how to read them: `windows` [questions], how
    many each has, `offsets` [windows, length, 2], `nulls` [windows], `search` (settings of `find_answer`), and of each
    question, `ids` where it has one, `contexts` and, except for prediction, `answers`. Metrics: `loss` over windows;
    `exact_match` and `f1` over questions, normalized as SQuAD has it. Prediction: id, answer (empty: none) and score.
    """

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    heads = ("qa_outputs", "classifier", "head")
    extras = ("windows", "offsets", "nulls", "search", "ids", "contexts", "answers")
    monitor = ("val_f1", "max")

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {name: mean() for name in ("loss", "exact_match", "f1")}

    def evaluate(self, module: Any, metrics: Metrics, batch: Batch) -> None:
        if "windows" not in batch:
            self.update(metrics, module(**batch), batch)
            return
        output = self._in_parts(module, batch)
        metrics["loss"].update(output.loss.detach(), len(batch["input_ids"]))
        for row, golds in zip(self._answers(output, batch), batch["answers"], strict=True):
            metrics["exact_match"].update(best_over(exact_match, row["answer"], golds))
            metrics["f1"].update(best_over(token_f1, row["answer"], golds))

    def predict(self, module: Any, batch: Batch) -> list[dict[str, Any]]:
        rows = self._answers(self._in_parts(module, batch), batch)
        return [{"id": name, **row} for name, row in zip(batch["ids"], rows, strict=True)] if "ids" in batch else rows

    def _in_parts(self, module: Any, batch: Batch) -> Any:
        """Run as many windows at a time as there are questions: long texts must not need more memory than short."""
        size, count = len(batch["windows"]), len(batch["input_ids"])
        inputs = {name: value for name, value in batch.items() if name not in self.extras}
        starts, ends, losses = [], [], torch.zeros(count)
        for at in range(0, count, size):
            part = {name: value[at : at + size] for name, value in inputs.items()}
            output = module(**part)
            starts.append(output.start_logits)
            ends.append(output.end_logits)
            if output.loss is not None:
                losses[at : at + size] = output.loss.detach()
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
