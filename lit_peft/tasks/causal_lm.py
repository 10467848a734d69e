"""Predict the next token."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lit_peft.tasks.base import Metrics, Task
from lit_peft.tasks.supervised_loss import supervised_loss


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood per token, over all tokens of all batches and processes."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class CausalLM(Task):
    """Next-token prediction. Batches: `input_ids`, `attention_mask`, `labels` [batch, length], -100 where unsupervised.

    Metrics: `loss` (mean over supervised tokens) and `perplexity`. Prediction generates a continuation.
    """

    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    new_head = False

    def loss_alone(self, model: Any) -> AbstractContextManager[None]:
        return supervised_loss(model)

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum()

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "perplexity": Perplexity()}

    def update(self, metrics: Metrics, output: Any, batch: dict[str, Tensor]) -> None:
        weight = self.weight(batch)
        # A batch without a supervised token has no loss; its 0/0 must not spoil the mean.
        loss = self.loss(output, batch).detach().nan_to_num()
        metrics["loss"].update(loss, weight)
        metrics["perplexity"].update(loss, weight)

    def predict(self, module: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        tokenizer = module.tokenizer
        settings = {"max_new_tokens": 64, "do_sample": False, **module.hparams.generation}
        settings.setdefault("pad_token_id", tokenizer.pad_token_id)
        out = module.generate(**inputs, **settings)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        prompts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
