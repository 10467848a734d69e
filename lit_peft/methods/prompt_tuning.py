"""Prompt Tuning (Lester et al. 2021, arXiv:2104.08691): settings, and initial virtual tokens."""

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
        prompt_tuning_init: initial virtual tokens (section 3.2). `SAMPLE_VOCAB`: embeddings of tokens drawn from the
            vocabulary, except for padding. `TEXT`: embeddings of the tokens of a text, repeated or cut to v tokens.
            `LABELS`: for each class label the mean embedding of its tokens, then tokens drawn from the vocabulary.
            `RANDOM`: uniform in [-0.5, 0.5].
        prompt_tuning_init_text: the text for `TEXT`.
        prompt_tuning_init_labels: the labels for `LABELS`. None uses the model's labels (`config.id2label`), at most v.
        tokenizer_name_or_path: the tokenizer of the text or labels. None uses the base model's.

    Raises:
        LitPeftError: a setting is invalid, or its value does not suit `prompt_tuning_init`.
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
                f"{self.prompt_tuning_init_text!r}: give a text if and only if prompt_tuning_init is 'TEXT'."
            )
        if self.prompt_tuning_init_labels is not None and self.prompt_tuning_init != "LABELS":
            raise LitPeftError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} with prompt_tuning_init_labels="
                f"{list(self.prompt_tuning_init_labels)}: labels are only used if prompt_tuning_init is 'LABELS'."
            )
        if len(self.prompt_tuning_init_labels or ()) > self.num_virtual_tokens:
            raise LitPeftError(
                f"num_virtual_tokens={self.num_virtual_tokens} is fewer than the "
                f"{len(self.prompt_tuning_init_labels or ())} prompt_tuning_init_labels: give more virtual tokens or "
                "fewer labels."
            )

    @torch.no_grad()
    def make_prompt(self, model: nn.Module, embeddings: nn.Module) -> SoftPrompt:
        """Build the initial virtual tokens in fp32.

        Args:
            model: the frozen model.
            embeddings: its input embeddings, with a weight of shape (vocabulary, hidden size).

        Returns:
            The virtual tokens, of shape (`rows`, hidden size).

        Raises:
            LitPeftError: the tokenizer or the labels' names are missing.
        """
        weight: Any = embeddings.weight
        if self.prompt_tuning_init == "RANDOM":
            initial = torch.rand(self.rows, weight.shape[1], device=weight.device) - 0.5
        else:
            ids = torch.randint(weight.shape[0], (self.rows,), device=weight.device)
            if (padding := getattr(embeddings, "padding_idx", None)) is not None:
                # Its embedding is often zero, where norms have huge gradients.
                ids = torch.where(ids == padding, (ids + 1) % weight.shape[0], ids)
            if self.prompt_tuning_init == "TEXT":
                text_ids = self._token_ids(model, [self.prompt_tuning_init_text or ""], special_tokens=True)[0]
                ids = torch.tensor((text_ids * self.rows)[: self.rows], device=weight.device)
            initial = embeddings(ids)
            if self.prompt_tuning_init == "LABELS":
                means = self._label_means(model, embeddings)[: self.rows]
                initial = torch.cat([means, initial[len(means) :]])
        return SoftPrompt(initial.float())

    def _label_means(self, model: Any, embeddings: nn.Module) -> Tensor:
        """The mean embedding of each label's tokens, (labels, hidden size)."""
        names = list(self.prompt_tuning_init_labels or (getattr(model.config, "id2label", None) or {}).values())
        if not names or all(str(name).startswith("LABEL_") for name in names):
            raise LitPeftError(
                "prompt_tuning_init='LABELS' needs the names of the labels, but the model has none: give them, e.g. "
                "prompt_tuning_init_labels=['negative', 'positive']."
            )
        device: Any = embeddings.weight.device
        token_ids = self._token_ids(model, [str(name) for name in names], special_tokens=False)
        return torch.stack([embeddings(torch.tensor(ids, device=device)).mean(0) for ids in token_ids])

    def _token_ids(self, model: Any, texts: list[str], special_tokens: bool) -> list[list[int]]:
        from transformers import AutoTokenizer

        source = self.tokenizer_name_or_path or getattr(model, "name_or_path", None)
        try:
            if not source:
                raise OSError("the model was not loaded from a folder or hub id")
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise LitPeftError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} needs a tokenizer, but {source!r} has none "
                f"({first_line(error)}): set tokenizer_name_or_path."
            ) from error
        token_ids: list[list[int]] = [tokenizer(text, add_special_tokens=special_tokens)["input_ids"] for text in texts]
        for text, ids in zip(texts, token_ids, strict=True):
            if not ids:
                raise LitPeftError(
                    f"prompt_tuning_init={self.prompt_tuning_init!r}: {text!r} has no tokens, so give another text."
                )
        return token_ids


class PromptTuningMixin(MethodMixin):
    """Makes Prompt Tuning the method of a LightningModule."""

    settings_class = PromptTuningSettings
