"""Predict the next token."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric

from lit_peft.tasks.answers import extract_answer, same_answer
from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task, float32_default
from lit_peft.tasks.packed import is_packed, prepare_packing, run_packed
from lit_peft.tasks.right_padding import ignores_right_padding
from lit_peft.tasks.supervised_loss import SupervisedLoss

# New tokens to generate if neither the module's `generation` nor the data module says how many.
MAX_NEW_TOKENS = 64


class Perplexity(Mean):
    """exp of the mean negative log-likelihood per token, over all tokens of all batches and processes."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class CausalLM(Task):
    """Next-token prediction. Batches: `input_ids`, `attention_mask`, `labels` [batch, length], -100 if unsupervised.

    Packed rows have `position_ids`, which restart with each example, and no `attention_mask`.

    Metrics: `loss` (mean over supervised tokens) and `perplexity`. Prediction generates a continuation, greedily unless
    `generation` says otherwise. A batch of prompts, padded on the left, with lists `kind` and `gold` (see
    `lit_peft.tasks.answers`) is evaluated by the generated text: `answer_accuracy`.
    """

    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    new_head = False
    packs = True
    generates = True
    extras: ClassVar[tuple[str, ...]] = ("kind", "gold")

    def __init__(self) -> None:
        self.supervised: SupervisedLoss | None = None
        self.packing_checked = False
        self.ignores_right_padding: bool | None = None

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        self.supervised, self.packing_checked = SupervisedLoss.of(model), False
        self.ignores_right_padding = None

    def forward(self, model: Any, batch: Batch) -> Any:
        if self.pads_right and not is_packed(batch):
            if self.ignores_right_padding is None:
                self.ignores_right_padding = ignores_right_padding(model)
            if self.ignores_right_padding:
                batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        return super().forward(model, batch)

    def run(self, model: Any, batch: Batch) -> Any:
        if not is_packed(batch):
            return super().run(model, batch)
        if not self.packing_checked:
            prepare_packing(model, self.may_choose_attention)
            self.packing_checked = True
        return run_packed(model, batch)

    def loss_only(self, model: Any) -> AbstractContextManager[None]:
        if self.supervised is None:
            self.supervised = SupervisedLoss.of(model)
        return self.supervised.active()

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum()

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {"loss": Mean(), "perplexity": Perplexity(), "answer_accuracy": Mean()}

    def update(self, metrics: Metrics, output: Any, batch: dict[str, Tensor]) -> None:
        weight = self.weight(batch)
        loss = self.precise_loss(output, batch)
        metrics["loss"].update(loss, weight)
        metrics["perplexity"].update(loss, weight)

    def evaluate(
        self, model: Any, metrics: Metrics, batch: Batch, generation: Generation
    ) -> list[dict[str, Any]] | None:
        if "gold" not in batch:
            return super().evaluate(model, metrics, batch, generation)
        rows = self.predict(model, batch, generation)
        with float32_default():
            for row in rows:
                metrics["answer_accuracy"].update(float(row["correct"]))
        return rows

    def predict(self, model: Any, batch: dict[str, Any], generation: Generation) -> list[dict[str, Any]]:
        """Return `prompt` and `text`; with `kind` also `answer`, and with `gold` also `gold` and `correct`."""
        inputs: Batch = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        rows = continuations(model, inputs, generation)
        for index, kind in enumerate(batch.get("kind", ())):
            rows[index]["answer"] = extract_answer(rows[index]["text"], kind)
            if "gold" in batch:
                gold = batch["gold"][index]
                rows[index].update(gold=gold, correct=same_answer(rows[index]["answer"], gold, kind))
        return rows


def continuations(model: Any, inputs: Batch, generation: Generation) -> list[dict[str, Any]]:
    """Return the `prompt` and the generated `text` of each row; greedily unless `generation` says otherwise.

    Args:
        model: a model that generates.
        inputs: what its `generate` takes, padded on the left.
        generation: the tokenizer and the settings.
    """
    tokenizer = generation.tokenizer
    settings = {
        "max_new_tokens": generation.max_new_tokens or MAX_NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        **generation.settings,
    }
    out = model.generate(**inputs, **settings)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    prompts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
