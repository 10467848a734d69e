"""One tag per word."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, Rows, Split
from lit_peft.data.collate import IGNORE, PadCollator
from lit_peft.data.conll import SUFFIXES, read_conll
from lit_peft.data.files import column_values
from lit_peft.models.tokenization import require_fast
from lit_peft.util.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset


class TokenClassificationData(LitDataModule):
    """Sentences as lists of words with a tag each.

    Files: CoNLL (.conll, .bio, .iob, .iob2, .txt, .tsv: a word and its tag on each line, an empty line between
    sentences), or json, jsonl, parquet with two columns of lists. A word's first token has its label, the others none
    (-100). Batches: `input_ids`, `attention_mask`, `labels`, `words` (each first token's word, else -1), all
    [batch, length]; to evaluate, the words' `tags`, and to predict, the `tokens`, which are the words.

    Args:
        tokens_column: column of the words.
        tags_column: column of the tags, by name or number.
        labels: all tags, in the order the model is to number them; unset: those of the training rows, "O" first, the
            others sorted. Needed to predict or test without the training file.
        token_position: which column of a CoNLL file the word is in, from 0.
        tag_position: which column of a CoNLL file the tag is in; negative: from the right.
        **common: see `LitDataModule`.
    """

    # Short sentences recur in the field's own splits.
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
        """The tags; a tag's position is the class the model predicts."""
        if self.labels is not None:
            names = [str(label) for label in self.labels]
            if len(set(names)) < len(names) or len(names) < 2:
                raise LitPeftError(f"data.labels is {self.labels}; give at least two different tags.")
            return names
        if "train" not in self.rows:
            raise LitPeftError("data.train is not given, so the tags are not known; give data.train or data.labels.")
        rows = self.rows["train"]
        declared = self._declared(rows.table)
        if declared:
            return list(declared)
        tags = column_values(rows.table, self.tags_column)
        seen = {str(tag) for row in rows.numbers for tag in tags[row] or ()}
        if len(seen) < 2:
            raise LitPeftError(
                f"{rows.field} {rows.source!r}: column {self.tags_column!r} holds only the tag(s) {sorted(seen)}; at "
                "least two are needed."
            )
        return sorted(seen, key=lambda tag: (tag != "O", tag))

    @property
    def num_labels(self) -> int:
        """Number of tags."""
        return len(self.label_names)

    def _declared(self, table: Dataset) -> list[str] | None:
        """The names that the numbers in a table's tags stand for, where it says so."""
        return getattr(getattr(table.features[self.tags_column], "feature", None), "names", None)

    # ------------------------------------------------------------------------------------------- rows

    def read(self, value: str, field: str, split: Split) -> Dataset:
        """A CoNLL file by its suffix, or a table."""
        if Path(value).suffix.lower() not in SUFFIXES:
            return super().read(value, field, split)
        tags = None if split == "predict" else self.tags_column
        return read_conll(value, field, self.tokens_column, tags, self.token_position, self.tag_position)

    def columns(self, split: Split) -> dict[str, str | None]:
        """The words, and the tags except for prediction."""
        needed: dict[str, str | None] = {"data.tokens_column": self.tokens_column}
        return needed if split == "predict" else {**needed, "data.tags_column": self.tags_column}

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The words."""
        tokens = column_values(table, self.tokens_column)
        return lambda row: tuple(map(str, tokens[row] or ()))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs words, and a known tag for each."""
        tokens = column_values(rows.table, self.tokens_column)
        for row in rows.numbers:
            words = tokens[row]
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise LitPeftError(
                    f"{rows.where(row)}: column {self.tokens_column!r} is {str(words)[:60]!r}; give a list of words."
                )
        if split == "predict":
            return rows
        tags, declared = column_values(rows.table, self.tags_column), self._declared(rows.table)
        for row in rows.numbers:
            given = tags[row]
            if not isinstance(given, list) or len(given) != len(tokens[row]) or None in given:
                count = len(given) if isinstance(given, list) else "no"
                raise LitPeftError(
                    f"{rows.where(row)} has {len(tokens[row])} words and {count} tags; give one for each."
                )
            if declared and min(given) < 0:
                raise LitPeftError(f"{rows.where(row)} has no tags in column {self.tags_column!r}; add them.")
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens, cut to `max_length`, with the number of each word's tag on its first token."""
        require_fast(self.tokenizer)
        tags_column, declared = (None if split == "predict" else self.tags_column), None
        if tags_column:
            declared, known = self._declared(rows.table), set(self.label_names)
            tags = column_values(rows.table, tags_column)
            for row in rows.numbers:
                for tag in tags[row]:
                    name = declared[tag] if declared else str(tag)
                    if name not in known:
                        raise LitPeftError(
                            f"{rows.where(row)}: tag {name!r} does not occur in training, which has "
                            f"{closest(name, self.label_names)}; correct it, or list all in data.labels."
                        )
        table = self.tokenized(
            rows,
            encode_words,
            f"Tokenizing {split}",
            tokens_column=self.tokens_column,
            tags_column=tags_column,
            declared=declared,
            label_names=self.label_names if tags_column else [],
            keep=split != "train",
            max_length=self.max_length,
        )
        return self.without_cuts(table, split, "sentences", column="lost", units="words")

    def collator(self, split: Split) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """As `LitDataModule.collator`, with what evaluation and prediction read beside the tokens."""
        return WordCollator(self.padding())


@dataclass(frozen=True)
class WordCollator:
    """Pads tokens, labels and words; tags and words as text are kept as lists.

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
    keep: bool,
    max_length: int,
) -> dict[str, list[Any]]:
    """Tokenize sentences, their words joined by spaces as in running text; `lost` counts words that were cut away."""
    ids = {name: at for at, name in enumerate(label_names)}
    sentences = batch[tokens_column]
    texts = [" ".join(words) for words in sentences]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    out: dict[str, list[Any]] = {key: list(encoded[key]) for key in ("input_ids", "token_type_ids") if key in encoded}
    out["words"] = [
        first_tokens(places, words) for places, words in zip(encoded["offset_mapping"], sentences, strict=True)
    ]
    out["lost"] = [len(words) - 1 - max(at) for at, words in zip(out["words"], sentences, strict=True)]
    if tags_column is not None:
        tags = [[declared[tag] if declared else str(tag) for tag in row] for row in batch[tags_column]]
        rows = zip(out["words"], tags, strict=True)
        out["labels"] = [[ids[row[at]] if at >= 0 else IGNORE for at in words] for words, row in rows]
        if keep:
            out["tags"] = tags
    else:
        out["tokens"] = sentences
    if not keep:
        del out["words"]
    return out


def first_tokens(places: list[tuple[int, int]], words: list[str]) -> list[int]:
    """Return for each token the number of the word it is the first token of, or -1.

    Args:
        places: first and last + 1 character of each token in the words joined by spaces; equal for special tokens.
        words: the words.
    """
    begins = [*accumulate((len(word) + 1 for word in words[:-1]), initial=0)]
    found: list[int] = []
    before = -1
    for start, end in places:
        # By the last character: the first may be the space before the word.
        at = bisect_right(begins, end - 1) - 1 if end > start else -1
        inside = at > before and end - 1 < begins[at] + len(words[at])
        found.append(at if inside else -1)
        before = max(before, found[-1])
    return found
