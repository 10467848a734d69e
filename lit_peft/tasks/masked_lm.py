"""Predict the masked tokens of a text: how encoders learn a language or a domain."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task
from lit_peft.tasks.causal_lm import Perplexity
from lit_peft.tasks.masked_loss import IGNORE, MaskedLoss, MaskedOutput
from lit_peft.util.errors import LitPeftError


class MaskedLM(Task):
    """Masked language modeling. Batches: `input_ids`, `attention_mask`, `labels` [batch, length], -100 if not masked.

    The loss, and the head, are computed at the masked positions only. A head that the base has no weights for is
    trained. Metrics: `loss` (mean over masked tokens), `perplexity` (its exponential; not that of a text) and
    `accuracy` (share of the masked tokens that are predicted exactly). Prediction fills in the mask tokens of each
    text, each one as if the others stayed masked.

    Args:
        top_k: number of tokens that prediction returns for each mask.

    Raises:
        LitPeftError: `top_k` is below 1.
    """

    name = "masked_lm"
    auto_class = "AutoModelForMaskedLM"
    extras = ("texts",)

    def __init__(self, top_k: int = 5) -> None:
        if top_k < 1:
            raise LitPeftError(f"task_args has top_k={top_k}: give a number of at least 1, e.g. 5.")
        self.top_k = top_k
        self.masked: MaskedLoss | None = None

    def model_class(self, config: Any) -> Any:
        """Return the auto class of an encoder.

        Raises:
            LitPeftError: the base is a decoder or an encoder-decoder.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise LitPeftError(
                f"task='masked_lm' needs an encoder, and model_type={config.model_type!r} has a decoder as well, which "
                "writes the missing text instead of filling in tokens: use task='seq2seq', with the corrupted text as "
                "the source and what is missing as the target, in the form that the base was trained with."
            )
        try:
            return super().model_class(config)
        except LitPeftError as error:
            raise LitPeftError(f"{error} A decoder is trained with task='causal_lm'.") from None

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        self.masked = MaskedLoss(model)

    def run(self, model: Any, batch: Batch) -> Any:
        if self.masked is not None and self.masked.enabled and "labels" in batch:
            return self.masked(batch)
        return super().run(model, batch)

    def loss_only(self, model: Any) -> AbstractContextManager[None]:
        if self.masked is None or self.masked.model is not model:
            self.masked = MaskedLoss(model)
        return self.masked.active()

    def weight(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    def float32_loss(self, output: Any, batch: Batch) -> Tensor | None:
        return cross_entropy(output.logits.float().flatten(0, -2), batch["labels"].flatten())

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {"loss": Mean(), "perplexity": Perplexity(), "accuracy": Mean()}

    @torch.no_grad()  # what is predicted right is counted in calls without gradients
    def evaluate(
        self, model: Any, metrics: Metrics, batch: Batch, generation: Generation
    ) -> list[dict[str, Any]] | None:
        """As `Task.evaluate`."""
        return super().evaluate(model, metrics, batch, generation)

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        weight, loss = self.weight(batch), self.precise_loss(output, batch)
        metrics["loss"].update(loss, weight)
        metrics["perplexity"].update(loss, weight)
        correct = output.correct if output.logits is None else (output.logits.argmax(-1) == batch["labels"]).sum()
        # The best of several NaN values is a token like any other.
        accuracy = torch.where(loss.isfinite(), correct / weight.clamp(min=1), torch.nan)
        metrics["accuracy"].update(accuracy, weight)

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        """Return for each text `text`, `filled` (the text with the best tokens) and `masks`.

        `masks` has for each mask token, in order, the `tokens` and their `probabilities`, the best first.
        """
        tokenizer = generation.tokenizer
        ids = batch["input_ids"]
        is_mask = ids == tokenizer.mask_token_id
        if self.masked is None or self.masked.model is not model:
            self.masked = MaskedLoss(model)
        with self.masked.active(keep_logits=True):
            output: Any = self.forward(model, {**batch, "labels": ids.masked_fill(~is_mask, IGNORE)})
        whole = not isinstance(output, MaskedOutput)
        logits = (output.logits[is_mask] if whole else output.logits).float()
        best = logits.softmax(-1).topk(min(self.top_k, logits.shape[-1]), dim=-1)
        filled = ids.masked_scatter(is_mask, best.indices[:, 0])
        texts = batch.get("texts") or tokenizer.batch_decode(ids)
        masks = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        rows = []
        for text, tokens, count in zip(texts, filled, is_mask.sum(1).tolist(), strict=True):
            found = [next(masks) for _ in range(count)]
            rows.append(
                {
                    "text": text,
                    "filled": tokenizer.decode(tokens, skip_special_tokens=True),
                    "masks": [
                        {"tokens": [tokenizer.decode([token]) for token in top], "probabilities": probabilities}
                        for top, probabilities in found
                    ],
                }
            )
        return rows
