"""Answer in text to messages with images."""

from __future__ import annotations

from typing import Any, ClassVar

from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score

from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task, float32_default
from lit_peft.tasks.causal_lm import CausalLM, continuations
from lit_peft.util.errors import LitPeftError


class ImageTextToText(CausalLM):
    """Next-token prediction after images and text, with models that read images.

    Batches: `input_ids`, `attention_mask`, `labels` [batch, length], -100 if unsupervised; and what the model's
    processor makes of the images, e.g. `pixel_values`. Metrics: `loss` (mean over supervised tokens) and `perplexity`.
    Prediction generates an answer, greedily unless `generation` says otherwise. A batch of prompts with `references` is
    evaluated by the generated text: `exact_match` (without white space around it) and `rougeL`, from 0 to 1.
    """

    name = "image_text_to_text"
    auto_class = "AutoModelForImageTextToText"
    packs = False
    extras: ClassVar[tuple[str, ...]] = ("references",)

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        if getattr(model.config, "is_encoder_decoder", False):
            raise LitPeftError(
                f"task={self.name!r} trains decoders, and {type(model).__name__} is an encoder-decoder, whose labels "
                "are not a part of its input: choose another base."
            )

    def forward(self, model: Any, batch: Batch) -> Any:
        # The mask stays: it is part of how some models place images.
        return Task.forward(self, model, batch)

    def run(self, model: Any, batch: Batch) -> Any:
        """Call the model on a batch without its extras; a loss needs no cache."""
        return model(**{"use_cache": False, **batch}) if "labels" in batch else model(**batch)

    def metrics(self, config: Any) -> dict[str, Metric]:
        own = super().metrics(config)
        own.pop("answer_accuracy")
        return {**own, "exact_match": Mean(), "rougeL": Mean()}

    def evaluate(
        self, model: Any, metrics: Metrics, batch: Batch, generation: Generation
    ) -> list[dict[str, Any]] | None:
        if "references" not in batch:
            return super().evaluate(model, metrics, batch, generation)
        rows = self.predict(model, batch, generation)
        with float32_default():
            for row, reference in zip(rows, batch["references"], strict=True):
                text = row["text"].strip()
                row.update(reference=reference, correct=text == reference.strip())
                metrics["exact_match"].update(float(row["correct"]))
                metrics["rougeL"].update(rouge_score(text, reference, rouge_keys="rougeL")["rougeL_fmeasure"])
        return rows

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        """Return `prompt`, in which an image's tokens are left out, and `text`."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", *self.extras)}
        return continuations(model, inputs, generation)
