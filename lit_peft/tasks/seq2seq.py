"""Generate a text from a text, with an encoder and a decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import BLEUScore, SacreBLEUScore

from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task, finite, float32_default

# New tokens to generate if the module's `generation` does not say how many.
MAX_NEW_TOKENS = 128
_ROUGE = ("rouge1", "rouge2", "rougeL")


class Seq2Seq(Task):
    """Summarization, translation. Batches: `input_ids`, `attention_mask` [batch, length], `labels` [batch, target].

    Labels are -100 on padding; the model makes the decoder's inputs from them. Metrics: `loss` over target tokens, and
    for the text generated from each source `rouge1`, `rouge2`, `rougeL` (mean F1 over examples), `bleu` and `sacrebleu`
    (over the corpus), all from 0 to 1. `model.generation` controls generation. Prediction returns source and generated
    text.
    """

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    new_head = False
    generates = True
    extras: ClassVar[tuple[str, ...]] = ("references",)

    def weight(self, batch: Batch) -> Tensor:
        return (batch["labels"] != -100).sum()

    def metrics(self, config: Any) -> dict[str, Metric]:
        rouge = {name: Mean() for name in _ROUGE}
        return {"loss": Mean(), **rouge, "bleu": finite(BLEUScore)(), "sacrebleu": finite(SacreBLEUScore)()}

    def float32_loss(self, output: Any, batch: Batch) -> Tensor | None:
        return cross_entropy(output.logits.float().flatten(0, -2), batch["labels"].flatten())

    def evaluate(
        self, model: Any, metrics: Metrics, batch: Batch, generation: Generation
    ) -> list[dict[str, Any]] | None:
        super().evaluate(model, metrics, batch, generation)
        texts, references = self.generate(model, batch, generation), self.references(batch, generation)
        with float32_default():
            for text, reference in zip(texts, references, strict=True):
                scores = rouge_score(text, reference, rouge_keys=_ROUGE)
                for name in _ROUGE:
                    metrics[name].update(scores[f"{name}_fmeasure"])
            for name in ("bleu", "sacrebleu"):
                metrics[name].update(texts, [[reference] for reference in references])
        return None

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        sources = generation.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        texts = self.generate(model, batch, generation)
        return [{"source": source, "text": text} for source, text in zip(sources, texts, strict=True)]

    def references(self, batch: Batch, generation: Generation) -> list[str]:
        """Return the texts that the generated ones are compared with: the batch's own, or else its labels as text."""
        if "references" in batch:
            texts: list[str] = batch["references"]
            return texts
        tokenizer = generation.tokenizer
        labels = batch["labels"].masked_fill(batch["labels"] == -100, tokenizer.pad_token_id)
        decoded: list[str] = tokenizer.batch_decode(labels, skip_special_tokens=True)
        return decoded

    def generate(self, model: Any, batch: Batch, generation: Generation) -> list[str]:
        """Return the text that the model generates for each row."""
        settings = {"max_new_tokens": MAX_NEW_TOKENS, **generation.settings}
        out = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
        texts: list[str] = generation.tokenizer.batch_decode(out, skip_special_tokens=True)
        return texts
