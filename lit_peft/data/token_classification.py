"""Sentences with one tag per word."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.collate import IGNORE, PadCollator
from lit_peft.data.conll import SUFFIXES, read_conll
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import drop_cut_column, note_lost_labels
from lit_peft.data.remote import inner_name
from lit_peft.data.rows import Rows, Split
from lit_peft.models.tokenization import require_fast
from lit_peft.util.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset


class TokenClassificationData(LitDataModule):
    """Sentences as lists of words with a tag each.

    Files: CoNLL (.conll, .bio, .iob, .iob2, .txt, .tsv: a word and its tag on each line, an empty line between
    sentences), or json, jsonl, parquet with two columns of lists. A word's first token has the label, the others have
    -100. Batches: `input_ids`, `attention_mask`, `labels`, `words` (the word's index on its first token, else -1), all
    [batch, length]; for evaluation also `tags`, the words' tags, and for prediction `tokens`, the words.

    Args:
        tokens_column: column of the words.
        tags_column: column of the tags, by name or number.
        labels: all tags, in the order of the classes; unset: those of the training rows, "O" first, the others sorted.
            Needed to predict or test without the training file.
        token_position: index of the column of a CoNLL file with the word, from 0.
        tag_position: index of the column of a CoNLL file with the tag; negative: from the right.
        **common: see `LitDataModule`.
    """

    task = "token_classification"
    # The standard splits share short sentences.
    drops_overlap = False

    def __init__(
        self,
        tokens_column: str = "tokens",
        tags_column: str = "tags",
        labels: list[str] | None = None,
        token_position: int = 0,
        tag_position: int = -1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.tokens_column = tokens_column
        self.tags_column = tags_column
        self.labels = labels
        self.token_position = token_position
        self.tag_position = tag_position

    # ----------------------------------------------------------------------------------------- labels

    @cached_property
    def label_names(self) -> list[str]:
        """The tags, in the order of the classes."""
        if self.labels is not None:
            names = [str(label) for label in self.labels]
            if len(set(names)) < len(names) or len(names) < 2:
                raise LitPeftError(f"data.labels is {self.labels}; give at least two different tags.")
            return names
        if "train" not in self.rows:
            raise LitPeftError("data.train is not given, so the tags are unknown; give data.train or data.labels.")
        rows = self.rows["train"]
        declared = self._declared(rows.table)
        if declared:
            return list(declared)
        tags = column_values(rows.table, self.tags_column)
        present = {str(tag) for index in rows.indices for tag in tags[index] or ()}
        if len(present) < 2:
            raise LitPeftError(
                f"{rows.field} {rows.source!r}: column {self.tags_column!r} has only the tag(s) {sorted(present)}; at "
                "least two are needed."
            )
        return sorted(present, key=lambda tag: (tag != "O", tag))

    @property
    def num_labels(self) -> int:
        """The number of tags."""
        return len(self.label_names)

    def _declared(self, table: Dataset) -> list[str] | None:
        """Return the names of the tags that a table stores as numbers; None if it does not declare them."""
        return getattr(getattr(table.features[self.tags_column], "feature", None), "names", None)

    # ------------------------------------------------------------------------------------------- rows

    def read(self, value: str, field: str, split: Split) -> Dataset:
        """Read a CoNLL file if the suffix is one of its suffixes, else a table."""
        if Path(inner_name(value)).suffix.lower() not in SUFFIXES:
            return super().read(value, field, split)
        tags = None if split == "predict" else self.tags_column
        return read_conll(value, field, self.tokens_column, tags, self.token_position, self.tag_position)

    def columns(self, split: Split) -> dict[str, str | None]:
        """The words and, except for prediction, the tags."""
        needed: dict[str, str | None] = {"data.tokens_column": self.tokens_column}
        return needed if split == "predict" else {**needed, "data.tags_column": self.tags_column}

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The words."""
        tokens = column_values(table, self.tokens_column)
        return lambda index: tuple(map(str, tokens[index] or ()))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs words and, except for prediction, a tag for each."""
        tokens = column_values(rows.table, self.tokens_column)
        for index in rows.indices:
            words = tokens[index]
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise LitPeftError(
                    f"{rows.locate(index)}: column {self.tokens_column!r} is {str(words)[:60]!r}; give a list of words."
                )
        if split == "predict":
            return rows
        tags, declared = column_values(rows.table, self.tags_column), self._declared(rows.table)
        for index in rows.indices:
            given = tags[index]
            if not isinstance(given, list) or len(given) != len(tokens[index]) or None in given:
                count = len(given) if isinstance(given, list) else "no"
                raise LitPeftError(
                    f"{rows.locate(index)} has {len(tokens[index])} words and {count} tags; give one for each."
                )
            if declared and min(given) < 0:
                raise LitPeftError(f"{rows.locate(index)} has no tags in column {self.tags_column!r}; add them.")
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens, cut to `max_length`, with the class of each word's tag on its first token."""
        require_fast(self.tokenizer)
        tags_column, declared = (None if split == "predict" else self.tags_column), None
        if tags_column:
            declared, known = self._declared(rows.table), set(self.label_names)
            tags = column_values(rows.table, tags_column)
            for index in rows.indices:
                for tag in tags[index]:
                    name = declared[tag] if declared else str(tag)
                    if name not in known:
                        raise LitPeftError(
                            f"{rows.locate(index)}: tag {name!r} does not occur in training, which has "
                            f"{closest(name, self.label_names)}; correct it, or list all in data.labels."
                        )
        table = tokenize(
            rows,
            encode_words,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            tokens_column=self.tokens_column,
            tags_column=tags_column,
            declared=declared,
            label_names=self.label_names if tags_column else [],
            with_words=split != "train",
            max_length=self.max_length,
        )
        lost = column_values(table, "lost")
        table = drop_cut_column(table, self.notes, split, "sentences", self.max_length, column="lost", unit="words")
        if tags_column:
            labels = [sum(label != IGNORE for label in row) for row in column_values(table, "labels")]
            words = [left + cut for left, cut in zip(labels, lost, strict=True)]
            lengths = column_values(table, "length")
            note_lost_labels(self.notes, split, lengths, words, lost, self.max_length, unit="words")
        return table.remove_columns("length")

    def collator(self, split: Split) -> Collate:
        """As `LitDataModule.collator`, with the words and tags that evaluation and prediction need."""
        return WordCollator(pad_collator(self))


@dataclass(frozen=True)
class WordCollator:
    """Pads tokens, labels and word indices; tags and words as text stay lists.

    Attributes:
        pad: pads the tokens.
    """

    pad: PadCollator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.pad(examples))
        if "words" in examples[0]:
            words = [{**example, "labels": example["words"]} for example in examples]
            batch["words"] = self.pad(words)["labels"].clamp(min=-1)
        for key in ("tags", "tokens"):
            if key in examples[0]:
                batch[key] = [example[key] for example in examples]
        return batch


def encode_words(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    tokens_column: str,
    tags_column: str | None,
    declared: list[str] | None,
    label_names: list[str],
    with_words: bool,
    max_length: int,
) -> dict[str, list[Any]]:
    """Tokenize sentences, with their words joined by spaces; `lost` is the number of words that were cut."""
    ids = {name: index for index, name in enumerate(label_names)}
    sentences = batch[tokens_column]
    texts = [" ".join(words) for words in sentences]
    lengths = [len(tokens) for tokens in tokenizer(texts, verbose=False)["input_ids"]]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    out: dict[str, list[Any]] = {key: list(encoded[key]) for key in ("input_ids", "token_type_ids") if key in encoded}
    out["words"] = [
        first_tokens(offsets, words) for offsets, words in zip(encoded["offset_mapping"], sentences, strict=True)
    ]
    out["length"] = lengths
    out["lost"] = [
        len(words) - _words_kept(indices, tokenizer.truncation_side)
        for indices, words in zip(out["words"], sentences, strict=True)
    ]
    if tags_column is not None:
        tags = [[declared[tag] if declared else str(tag) for tag in row] for row in batch[tags_column]]
        rows = zip(out["words"], tags, strict=True)
        out["labels"] = [[ids[row[word]] if word >= 0 else IGNORE for word in words] for words, row in rows]
        if with_words:
            out["tags"] = tags
    else:
        out["tokens"] = sentences
    if not with_words:
        del out["words"]
    return out


def _words_kept(indices: list[int], truncation_side: str) -> int:
    """Return how many words are left of a sentence, given what `first_tokens` returns for it."""
    kept = [index for index in indices if index >= 0]
    if not kept:
        return 0
    # Words without a token of their own are not lost.
    return max(kept) + 1 - (min(kept) if truncation_side == "left" else 0)


def first_tokens(offsets: list[tuple[int, int]], words: list[str]) -> list[int]:
    """Return for each token the index of the word it is the first token of, or -1.

    Args:
        offsets: start and end character of each token in the words joined by spaces; equal for special tokens.
        words: the words.
    """
    starts = [*accumulate((len(word) + 1 for word in words[:-1]), initial=0)]
    indices: list[int] = []
    previous = -1
    for start, end in offsets:
        # By the last character, because the first may be the space before the word.
        word = bisect_right(starts, end - 1) - 1 if end > start else -1
        inside = word > previous and end - 1 < starts[word] + len(words[word])
        indices.append(word if inside else -1)
        previous = max(previous, indices[-1])
    return indices
