"""Predict the next token."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lit_peft.tasks.answers import extract_answer, same_answer
from lit_peft.tasks.base import Batch, Metrics, Task, mean
from lit_peft.tasks.packed import is_packed, packed_inputs
from lit_peft.tasks.supervised_loss import supervised_loss

# New tokens, where neither the module's `generation` nor the data module says how many.
MAX_NEW_TOKENS = 64


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood per token, over all tokens of all batches and processes."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class CausalLM(Task):
    """Next-token prediction. Batches: `input_ids`, `attention_mask`, `labels` [batch, length], -100 where unsupervised.

    Packed rows have `position_ids`, which begin again with each example, and no `attention_mask`.

    Metrics: `loss` (mean over supervised tokens) and `perplexity`. Prediction generates a continuation, greedily unless
    the module's `generation` says otherwise. A batch of prompts, padded on the left, with lists `kind` and `gold` (see
    `lit_peft.tasks.answers`) is judged by what is generated: `answer_accuracy`.
    """

    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    new_head = False
    extras = ("kind", "gold")

    def run(self, model: Any, batch: Batch) -> Any:
        return model(**packed_inputs(model, batch) if is_packed(batch) else batch)

    def loss_alone(self, model: Any) -> AbstractContextManager[None]:
        return supervised_loss(model)

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum()

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {"loss": mean(), "perplexity": Perplexity(nan_strategy=float("nan")), "answer_accuracy": mean()}

    def update(self, metrics: Metrics, output: Any, batch: dict[str, Tensor]) -> None:
        weight = self.weight(batch)
        loss = self.loss(output, batch).detach()
        metrics["loss"].update(loss, weight)
        metrics["perplexity"].update(loss, weight)

    def evaluate(self, module: Any, metrics: Metrics, batch: Batch) -> list[dict[str, Any]] | None:
        if "gold" not in batch:
            return super().evaluate(module, metrics, batch)
        rows = self.predict(module, batch)
        for row in rows:
            metrics["answer_accuracy"].update(float(row["correct"]))
        return rows

    def predict(self, module: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Return `prompt` and `text`; with `kind` also `answer`, and with `gold` also `gold` and `correct`."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        tokenizer = module.tokenizer
        data = getattr(module._trainer, "datamodule", None)
        settings = {
            "max_new_tokens": getattr(data, "max_new_tokens", None) or MAX_NEW_TOKENS,
            "do_sample": False,
            "pad_token_id": tokenizer.pad_token_id,
            **module.hparams.generation,
        }
        out = module.generate(**inputs, **settings)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        prompts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        rows: list[dict[str, Any]] = [
            {"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
        ]
        for at, kind in enumerate(batch.get("kind", ())):
            rows[at]["answer"] = extract_answer(rows[at]["text"], kind)
            if "gold" in batch:
                gold = batch["gold"][at]
                rows[at].update(gold=gold, correct=same_answer(rows[at]["answer"], gold, kind))
        return rows
