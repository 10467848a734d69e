"""Prompt Tuning (Lester et al. 2021, arXiv:2104.08691): settings, and where the virtual tokens start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.soft_prompt import SoftPromptSettings
from lit_peft.nn.prompt import SoftPrompt
from lit_peft.util.errors import LitPeftError, first_line

InitPrompt = Literal["SAMPLE_VOCAB", "TEXT", "LABELS", "RANDOM"]


@dataclass(frozen=True)
class PromptTuningSettings(SoftPromptSettings):
    """Settings of Prompt Tuning: v trained embeddings in front of the input (section 2).

    Args:
        prompt_tuning_init: where the virtual tokens start (section 3.2): `SAMPLE_VOCAB`, embeddings of tokens drawn
            from the vocabulary; `TEXT`, those of a text's tokens, repeated or cut to v; `LABELS`, one for each class
            label (of the model's own the first v), the mean over its tokens, the rest drawn from the vocabulary;
            `RANDOM`, uniform in [-0.5, 0.5].
        prompt_tuning_init_text: the text, for `TEXT`.
        prompt_tuning_init_labels: the labels, for `LABELS`; the model's own names (`config.id2label`) when None.
        tokenizer_name_or_path: whose tokenizer splits text and labels; the base model's when None.
    """

    method: ClassVar[str] = "prompt_tuning"
    prompt_tuning_init: InitPrompt = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = None
    prompt_tuning_init_labels: tuple[str, ...] | list[str] | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in get_args(InitPrompt):
            known = ", ".join(get_args(InitPrompt))
            raise LitPeftError(f"prompt_tuning_init={self.prompt_tuning_init!r} is not known: use one of {known}.")
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise LitPeftError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} with prompt_tuning_init_text="
                f"{self.prompt_tuning_init_text!r}: a text goes with prompt_tuning_init='TEXT', and only there."
            )
        if self.prompt_tuning_init_labels is not None and self.prompt_tuning_init != "LABELS":
            raise LitPeftError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} with prompt_tuning_init_labels="
                f"{list(self.prompt_tuning_init_labels)}: labels go with prompt_tuning_init='LABELS'."
            )
        if len(self.prompt_tuning_init_labels or ()) > self.num_virtual_tokens:
            raise LitPeftError(
                f"num_virtual_tokens={self.num_virtual_tokens} has no place for "
                f"{len(self.prompt_tuning_init_labels or ())} prompt_tuning_init_labels: give at least as many virtual "
                "tokens, or fewer labels."
            )

    @torch.no_grad()
    def make_prompt(self, model: nn.Module, embeddings: nn.Module) -> SoftPrompt:
        """The virtual tokens at their start, in single precision."""
        weight: Any = embeddings.weight
        if self.prompt_tuning_init == "RANDOM":
            start = torch.rand(self.rows, weight.shape[1], device=weight.device) - 0.5
        else:
            ids = torch.randint(weight.shape[0], (self.rows,), device=weight.device)
            if self.prompt_tuning_init == "TEXT":
                text = self._tokens(model, [self.prompt_tuning_init_text or ""], special=True)[0]
                ids = torch.tensor((text * self.rows)[: self.rows], device=weight.device)
            start = embeddings(ids)
            if self.prompt_tuning_init == "LABELS":
                means = self._label_means(model, embeddings)[: self.rows]
                start = torch.cat([means, start[len(means) :]])
        return SoftPrompt(start.float())

    def _label_means(self, model: Any, embeddings: nn.Module) -> Tensor:
        names = list(self.prompt_tuning_init_labels or (getattr(model.config, "id2label", None) or {}).values())
        if not names or all(str(name).startswith("LABEL_") for name in names):
            raise LitPeftError(
                "prompt_tuning_init='LABELS' and the model's labels have no names: give prompt_tuning_init_labels="
                "['negative', 'positive'], in your labels' words."
            )
        device: Any = embeddings.weight.device
        tokens = self._tokens(model, [str(name) for name in names], special=False)
        return torch.stack([embeddings(torch.tensor(ids, device=device)).mean(0) for ids in tokens])

    def _tokens(self, model: Any, texts: list[str], special: bool) -> list[list[int]]:
        from transformers import AutoTokenizer

        where = self.tokenizer_name_or_path or getattr(model, "name_or_path", None)
        try:
            if not where:
                raise OSError("the model was not loaded from a folder or hub id")
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        except (OSError, ValueError) as problem:
            raise LitPeftError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} needs a tokenizer, and there is none at {where!r} "
                f"({first_line(problem)}): give tokenizer_name_or_path."
            ) from problem
        tokens: list[list[int]] = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        for text, ids in zip(texts, tokens, strict=True):
            if not ids:
                raise LitPeftError(f"{text!r} has no tokens to start virtual tokens from: give another text.")
        return tokens


class PromptTuningMixin(MethodMixin):
    """Prompt Tuning as a LightningModule's method."""

    settings_class = PromptTuningSettings
