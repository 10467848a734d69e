"""Write down what is said in a recording."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import CharErrorRate, WordErrorRate

from lit_peft.methods.attachment import MethodSettings, attachment_of
from lit_peft.methods.soft_prompt import SoftPromptSettings
from lit_peft.models.architectures import learned_positions
from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task, finite, float32_default
from lit_peft.tasks.seq2seq import Seq2Seq
from lit_peft.util.errors import LitPeftError, first_line

# New tokens to generate if the module's `generation` does not say how many: half of Whisper's positions.
_MAX_NEW_TOKENS = 224
# Settings of Whisper's generation that its first tokens decide.
_FIRST = ("language", "task", "prompt_ids", "forced_decoder_ids", "decoder_input_ids")


class SpeechSeq2Seq(Seq2Seq):
    """Speech recognition and translation with an encoder of audio and a decoder of text, as Whisper's.

    Batches: the features under the name that the model gives them (`input_features` or `input_values`), optionally
    their `attention_mask`, and `labels` [batch, length], -100 on padding; the model makes the decoder's inputs from
    them. Generation starts with `decoder_prompt` [batch, length], if the batch has it.

    Metrics: `loss` over the tokens of the transcripts, and for the generated text `wer` and `cer`, the word and
    character error rates over all rows. `model.generation` controls generation. Testing returns the `text` and the
    `reference` of each row, prediction the `audio`'s path and the `text`.

    Args:
        normalizer: what is done to both texts before error rates are computed: `none`; or `basic`: lower case, without
            punctuation and symbols.
    """

    name = "speech_seq2seq"
    auto_class = "AutoModelForSpeechSeq2Seq"
    extras = ("references", "decoder_prompt", "audio")
    free_settings = ("normalizer",)
    monitor = ("val_wer", "min")
    # The language of the data module's transcripts; None: unknown or none.
    language: str | None = None

    def __init__(self, normalizer: Literal["none", "basic"] = "none") -> None:
        if normalizer not in ("none", "basic"):
            raise LitPeftError(f"task_args: normalizer={normalizer!r}: use 'none' or 'basic'.")
        self.normalizer = normalizer

    def check_method(self, settings: MethodSettings) -> None:
        """Refuse virtual tokens, because an encoder of audio has no tokens that they could stand among."""
        if isinstance(settings, SoftPromptSettings):
            raise LitPeftError(
                f"task={self.name!r}: {settings.method} puts virtual tokens among those of the encoder, which takes "
                "audio and has none: use PrefixTuning or PTuningV2, whose prefixes go into attention, or LoRA or an "
                "adapter."
            )

    def check_data(self, data: Any) -> None:
        """Note the language of the transcripts."""
        self.language = getattr(data, "language", None)

    def prepare(self, model: Any) -> None:
        """Note how many positions the decoder has.

        Raises:
            LitPeftError: the transcripts have a language, and the model is for English only.
        """
        self.positions = learned_positions(model.get_decoder())
        if self.positions is not None:
            # The prefix of the decoder's own attention has positions, too.
            self.positions -= getattr(attachment_of(model).settings, "num_virtual_tokens", 0)
        settings = getattr(model, "generation_config", None)
        if self.language is not None and getattr(settings, "is_multilingual", True) is False:
            raise LitPeftError(
                f"data.language is {self.language!r}, and the base is for English only, so its transcripts begin "
                "without a language: leave data.language and data.speech_task out, or choose a multilingual base."
            )

    def run(self, model: Any, batch: Batch) -> Any:
        """Call the model on a batch without its extras, with features of its own type."""
        if "labels" in batch:
            self.check_length(batch["labels"].shape[-1], "A batch")
        return super().run(model, _as_model(model, batch))

    def metrics(self, config: Any) -> dict[str, Metric]:
        return {"loss": Mean(), "wer": finite(WordErrorRate)(), "cer": finite(CharErrorRate)()}

    def evaluate(
        self, model: Any, metrics: Metrics, batch: Batch, generation: Generation
    ) -> list[dict[str, Any]] | None:
        Task.evaluate(self, model, metrics, batch, generation)
        texts, references = self.generate(model, batch, generation), self.references(batch, generation)
        with float32_default():
            for name in ("wer", "cer"):
                metrics[name].update([self.normalize(text) for text in texts], [*map(self.normalize, references)])
        return [{"text": text, "reference": reference} for text, reference in zip(texts, references, strict=True)]

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        texts = self.generate(model, batch, generation)
        paths = batch.get("audio") or [None] * len(texts)
        return [{"audio": path, "text": text} for path, text in zip(paths, texts, strict=True)]

    def normalize(self, text: str) -> str:
        """Return a text as error rates compare it."""
        return basic_form(text) if self.normalizer == "basic" else text

    def generate(self, model: Any, batch: Batch, generation: Generation) -> list[str]:
        """Return the text that the model writes for each row.

        Raises:
            LitPeftError: a setting of the generation contradicts the data's, or the model does not accept it.
        """
        given, tokenizer = dict(generation.settings), generation.tokenizer
        names = (model.main_input_name, "attention_mask")
        inputs = _as_model(model, {name: batch[name] for name in names if name in batch})
        prompt, start = batch.get("decoder_prompt"), 1
        if prompt is not None:
            if conflict := next((name for name in _FIRST if given.get(name) is not None), None):
                raise LitPeftError(
                    f"model.generation has {conflict}, but what generation starts with is the data's to say: set "
                    "data.language and data.speech_task instead."
                )
            inputs["decoder_input_ids"], start = prompt, prompt.shape[-1]
            if getattr(tokenizer, "language", None) and hasattr(model.generation_config, "lang_to_id"):
                # The same as the prompt says; without it, Whisper would find out the language of each row first.
                given.update(language=tokenizer.language, task=tokenizer.task)
        if "max_new_tokens" not in given and "max_length" not in given:
            room = _MAX_NEW_TOKENS if self.positions is None else self.positions - start
            given["max_new_tokens"] = min(_MAX_NEW_TOKENS, room)
        # Without it, transformers warns that the model's own maximum has no effect.
        given.setdefault("max_length", None)
        try:
            out = model.generate(**inputs, **given)
        except LitPeftError:
            raise
        except ValueError as problem:  # of Whisper's own checks
            raise LitPeftError(f"model.generation {given} is not possible: {first_line(problem)}") from problem
        texts: list[str] = tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _as_model(model: Any, batch: Batch) -> Batch:
    """Return a batch with its features in the type of the model's weights."""
    features: Tensor | None = batch.get(model.main_input_name)
    if features is None or not features.is_floating_point():
        return batch
    return {**batch, model.main_input_name: features.to(model.dtype)}


def basic_form(text: str) -> str:
    """Return a text in lower case, with spaces for punctuation and symbols; apostrophes within words stay."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = (
        character
        if unicodedata.category(character)[0] not in "PS" or (character == "'" and _within_word(text, at))
        else " "
        for at, character in enumerate(text)
    )
    return " ".join("".join(kept).split())


def _within_word(text: str, at: int) -> bool:
    return text[at - 1 : at].isalnum() and text[at + 1 : at + 2].isalnum()
