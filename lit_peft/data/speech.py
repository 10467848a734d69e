"""Recordings of speech and their transcripts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_peft.data.audio import SUFFIXES, AudioError, audio_key, audio_path, file_states, local_audio, read_audio
from lit_peft.data.collate import IGNORE
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values, resolve_file
from lit_peft.data.lengths import MaxLength
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import drop_cut_column, share_of
from lit_peft.data.processors import ProcessorData
from lit_peft.data.rows import Rows, Split, require_text
from lit_peft.data.settings import refuse_unused
from lit_peft.data.transcripts import encode_speech, first_tokens
from lit_peft.models.audio_features import audio_part, extract_features, longest_audio
from lit_peft.models.loading import BaseSettings, load_config
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset


class SpeechData(ProcessorData):
    """Recordings and their transcripts, for speech recognition and translation.

    A recording is a path, which starts at the folder of the data file; the bytes of a file; or `{"array": …,
    "sampling_rate": …}`. Plain wav files are read without further packages, others by soundfile. Channels are averaged,
    and other rates are resampled to that of the base's feature extractor. For prediction, audio files can be given
    themselves.

    Batches: the features under the model's own name (`input_features`, `input_values`), their `attention_mask`, and
    `labels` [batch, length], -100 on padding; the model makes the decoder's inputs from them. Labels begin with the
    tokens of language and task, if the tokenizer has such, and end with its end token. Except for training,
    `references` are the transcripts as text, and `decoder_prompt` [batch, length] is what generation starts with.

    Args:
        audio_column: column of the recording.
        text_column: column of the transcript.
        language: language of the transcripts, for a multilingual Whisper: a name or a code, e.g. 'german' or 'de'.
        speech_task: 'transcribe', or 'translate' into English, for a multilingual Whisper; unset: 'transcribe'.
        max_seconds: longest recording; unset: what the feature extractor takes (30 seconds for Whisper).
        long_audio: what happens to longer ones: 'error'; 'truncate': their end is not heard; or 'drop': they are left
            out, though not of prediction.
        **common: see `ProcessorData` and `LitDataModule`. `max_length` is the maximum number of tokens of a transcript;
            unset: the model's.
    """

    task = "speech_seq2seq"
    learns_tokens = True
    truncation_sides = ("right", "drop")
    # Recordings are not cut with their transcripts, so no transcript is cut that the model can take.
    max_length: Any = MaxLength(lambda data: None)

    def __init__(
        self,
        audio_column: str = "audio",
        text_column: str = "text",
        language: str | None = None,
        speech_task: Literal["transcribe", "translate"] | None = None,
        max_seconds: float | None = None,
        long_audio: Literal["error", "truncate", "drop"] = "error",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.audio_column = audio_column
        self.text_column = text_column
        self.language = language
        self.speech_task = speech_task
        self.max_seconds = max_seconds
        self.long_audio = long_audio
        refuse_unused("without data.language", {"speech_task": speech_task and language is None})
        refuse_unused("for speech, whose recordings are read batch by batch in any case", {"streaming": self.streaming})
        refuse_unused("for speech, whose labels are padded on the right", {"padding_side": self.padding_side})
        for name, value, known in (
            ("speech_task", speech_task, (None, "transcribe", "translate")),
            ("long_audio", long_audio, ("error", "truncate", "drop")),
        ):
            if value not in known:
                raise LitPeftError(f"data.{name} is {value!r}; use {' or '.join(repr(k) for k in known if k)}.")
        if max_seconds is not None and not 0 < max_seconds < float("inf"):
            raise LitPeftError(f"data.max_seconds is {max_seconds}; it must be a positive number.")

    @property
    def feature_extractor(self) -> Any:
        """The processor's feature extractor."""
        return audio_part(self.processor, str(self.base))

    @cached_property
    def decoder_start(self) -> int | None:
        """The token that the model puts in front of labels; None if it is unknown."""
        if self.base is None:
            return None
        return getattr(load_config(BaseSettings(self.base, self.revision)), "decoder_start_token_id", None)

    @property
    def longest(self) -> float | None:
        """The seconds of the longest recording that is taken whole; None if there is no limit.

        Raises:
            LitPeftError: `max_seconds` is more than the model takes.
        """
        limit = longest_audio(self.feature_extractor)
        if self.max_seconds is not None and limit is not None and self.max_seconds > limit:
            raise LitPeftError(
                f"data.max_seconds is {self.max_seconds:g}, and the base takes {limit:g} seconds at most; give at most "
                "that."
            )
        return limit if self.max_seconds is None else self.max_seconds

    def columns(self, split: Split) -> dict[str, str | None]:
        """The recording and, except for prediction, the transcript."""
        needed: dict[str, str | None] = {"data.audio_column": self.audio_column}
        return needed if split == "predict" else {**needed, "data.text_column": self.text_column}

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The recording."""
        return audio_key(table, self.audio_column)

    def read(self, value: str, field: str, split: Split) -> Dataset:
        """As `LitDataModule.read`; an audio file is a table of one row."""
        if Path(value).suffix.lower() not in SUFFIXES:
            return super().read(value, field, split)
        if split != "predict":
            raise LitPeftError(f"{field} {value!r} is an audio file without a transcript; give a table with both.")
        from datasets import Dataset

        return Dataset.from_dict({self.audio_column: [str(resolve_file(value, field, SUFFIXES))]})

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`, with paths as they are found from here."""
        return local_audio(super().prepare_table(table, split, field, source), self.audio_column, source)

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a transcript, except for prediction."""
        require_text(rows, [column for column in self.columns(split).values() if column != self.audio_column])
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens of the transcripts, and the recordings as they are: they are read batch by batch."""
        text_column = None if split == "predict" else self.text_column
        around = len(first_tokens(self.tokenizer, self.decoder_start)) + 1
        if text_column is not None and self.max_length <= around:
            raise LitPeftError(
                f"data.max_length is {self.max_length}, and every transcript begins and ends with {around} tokens of "
                "its own: give more."
            )
        if not first_tokens(self.tokenizer, self.decoder_start)[1:] and hasattr(self.tokenizer, "set_prefix_tokens"):
            self.notes.add(
                "data.language is not set: transcripts begin without tokens of a language and a task, as those of an "
                "English-only Whisper do.",
                once=True,
            )
        table = tokenize(
            rows,
            encode_speech,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            audio_column=self.audio_column,
            text_column=text_column,
            start=self.decoder_start,
            max_length=self.max_length,
            with_references=split != "train",
            files=file_states(rows.to_table(), self.audio_column),
        )
        table = self._without_long(table, rows, split)
        if split != "predict":
            table = drop_cut_column(table, self.notes, split, "transcripts", self.max_length)
        return table.remove_columns(["seconds", "rate"])

    def _without_long(self, table: Dataset, rows: Rows, split: Split) -> Dataset:
        """Note how much audio there is, and do with long recordings what `long_audio` says."""
        seconds, rates, limit = column_values(table, "seconds"), column_values(table, "rate"), self.longest
        if not seconds:
            return table
        rate = self.feature_extractor.sampling_rate
        others = sorted({other for other in rates if other != rate})
        changed = sum(other != rate for other in rates)
        resampled = f"; {share_of(changed, len(rates), 'recordings')} resampled to {rate} Hz from {_listed(others)} Hz"
        self.notes.add(
            f"data.{split}: {_duration(sum(seconds))} of audio in {len(seconds):,} recordings, the longest of "
            f"{max(seconds):.1f} s{resampled if changed else ''}."
        )
        long = [index for index, length in enumerate(seconds) if limit is not None and length > limit]
        if not long or limit is None:
            return table
        if self.long_audio == "error" or (self.long_audio == "drop" and split == "predict"):
            choices = "'truncate'" if split == "predict" else "'truncate' or 'drop'"
            raise LitPeftError(
                f"{rows.locate(rows.indices[long[0]])} has {seconds[long[0]]:.1f} seconds of audio, and at most "
                f"{limit:g} are taken: split the recording, or set data.long_audio to {choices}."
            )
        count = share_of(len(long), len(seconds), "recordings")
        if self.long_audio == "truncate":
            lost = sum(seconds[index] - limit for index in long)
            self.notes.add(
                f"data.{split}: {count} cut to {limit:g} seconds; {_duration(lost)} not heard"
                f"{'' if split == 'predict' else ', though their transcripts are whole'}.",
                warn=True,
            )
            return table
        if len(long) == len(seconds):
            raise LitPeftError(
                f"{rows.field}: every recording is longer than {limit:g} seconds, and data.long_audio 'drop' leaves "
                "them out; split them."
            )
        self.notes.add(f"data.{split}: {count} left out, because they are longer than {limit:g} seconds.")
        over = set(long)
        return table.select([index for index in range(len(seconds)) if index not in over])

    def to_show(self, example: dict[str, Any]) -> dict[str, Any]:
        """As `LitDataModule.to_show`: the transcript, all of which is learned."""
        return {"input_ids": example["input_ids"], "labels": example["input_ids"]}

    def collator(self, split: Split) -> Collate:
        """Return the function that reads the recordings of a batch and pads their features and labels."""
        start = self.decoder_start
        before = first_tokens(self.tokenizer, start)
        first = self.tokenizer.bos_token_id if start is None else start
        prompt = [first, *before] if before and split != "train" else None
        return SpeechCollator(self.feature_extractor, self.longest, split != "predict", prompt, self.pad_to_multiple_of)


@dataclass(frozen=True)
class SpeechCollator:
    """Reads recordings, and makes a batch of their features and of their transcripts.

    Attributes:
        extractor: the feature extractor.
        seconds: what is longer is cut to this; None: nothing.
        labelled: whether the examples have transcripts.
        prompt: the tokens that generation starts with; None: the model's own.
        multiple: round the length of the labels up to a multiple of this; None: no rounding.
    """

    extractor: Any
    seconds: float | None = None
    labelled: bool = True
    prompt: list[int] | None = None
    multiple: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        recordings = [self._read(example["audio"]) for example in examples]
        batch = extract_features(self.extractor, recordings)
        if self.labelled:
            longest = max(len(example["input_ids"]) for example in examples)
            longest += -longest % (self.multiple or 1)
            labels = torch.full((len(examples), longest), IGNORE)
            for row, example in enumerate(examples):
                labels[row, : len(example["input_ids"])] = torch.as_tensor(example["input_ids"])
            batch["labels"] = labels
        if self.prompt is not None:
            batch["decoder_prompt"] = torch.tensor([self.prompt] * len(examples))
        if "reference" in examples[0]:
            batch["references"] = [example["reference"] for example in examples]
        if not self.labelled:
            batch["audio"] = [audio_path(example["audio"]) for example in examples]
        return batch

    def _read(self, cell: Any) -> Any:
        rate = self.extractor.sampling_rate
        try:
            samples = read_audio(cell, rate, self.seconds)
        except AudioError as problem:
            raise LitPeftError(f"A recording {problem}.") from problem
        return samples if self.seconds is None else samples[: round(self.seconds * rate)]


def _listed(rates: list[int]) -> str:
    return ", ".join(map(str, rates[:3])) + (" and others" if len(rates) > 3 else "")


def _duration(seconds: float) -> str:
    """Return a time in words: "12.0 seconds", "3.5 minutes" or "2.4 hours"."""
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
