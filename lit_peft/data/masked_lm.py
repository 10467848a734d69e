"""Text with masked tokens, to learn a language or a domain from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.collate import PadCollator
from lit_peft.data.encoding import tokenize
from lit_peft.data.long_texts import special_ends, text_pieces
from lit_peft.data.masking import Masking, word_numbers
from lit_peft.data.rows import RowError, Rows, Split, require_text, text_key
from lit_peft.data.sampling import Drawn
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


class MaskedLMData(LitDataModule):
    """Raw text of which a part of the tokens is masked, for `task=masked_lm`.

    Texts are joined, with the separator token between them, and cut into examples of `max_length` tokens; nothing is
    lost. In training, the masks are drawn anew in each epoch; those of validation and test are always the same. Special
    tokens are never masked. Batches: `input_ids`, `attention_mask`, `labels`, all [batch, length]; labels are the
    original tokens where they are to be predicted, else -100. Prediction reads texts that contain the tokenizer's mask
    token, e.g. "The film is [MASK].", and has their `texts`.

    Args:
        text_column: column of the text.
        text_unit: one text of a txt file: `line`, `paragraph` (empty lines between them) or `document` (the file).
        join_texts: join texts, so that examples are full; else each example is a text, or a part of one.
        mlm_probability: share of the tokens to predict.
        masking: what is masked: each `token` on its own; `whole_word`: all tokens of a word or none; `span`: spans of
            words, 3.8 long on average (SpanBERT).
        mask_replace_prob: share of the tokens to predict that the mask token replaces.
        random_replace_prob: share of them that a random token replaces; the rest stays.
        **common: see `LitDataModule`.
    """

    task = "masked_lm"
    learns_tokens = True
    truncation_sides = ("right",)
    # Changing these changes the masks of a run that is resumed.
    drawing_settings = ("mlm_probability", "masking", "mask_replace_prob", "random_replace_prob", "seed")

    def __init__(
        self,
        text_column: str = "text",
        text_unit: Literal["line", "paragraph", "document"] = "line",
        join_texts: bool = True,
        mlm_probability: float = 0.15,
        masking: Literal["token", "whole_word", "span"] = "token",
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if text_unit not in ("line", "paragraph", "document"):
            raise LitPeftError(f"data.text_unit {text_unit!r} is not known: use 'line', 'paragraph' or 'document'.")
        self.text_column = text_column
        self.text_unit = text_unit
        self.join_texts = join_texts
        self.mlm_probability = mlm_probability
        self.masking = masking
        self.mask_replace_prob = mask_replace_prob
        self.random_replace_prob = random_replace_prob
        self._masks(0, 1)  # refuses values out of range before anything is read

    def columns(self, split: Split) -> dict[str, str | None]:
        """The text column."""
        return {"data.text_column": self.text_column}

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The text."""
        return text_key(table, [self.text_column])

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a text."""
        require_text(rows, [self.text_column], longest=None)
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens, at most `max_length` per example; with whole words or spans also the number of each token's word.

        Raises:
            LitPeftError: the tokenizer has no mask token, or does not say which tokens make a word.
        """
        tokenizer = self.tokenizer
        if tokenizer.mask_token_id is None:
            raise LitPeftError(
                f"The tokenizer of {self.base or self.tokenizer_name!r} has no mask token, so no token can be masked: "
                "choose a base that was trained with masked tokens, e.g. BERT, or task='causal_lm' for a decoder."
            )
        if split == "predict":
            return tokenize(
                rows,
                encode_prompts,
                tokenizer,
                f"Tokenizing {split}",
                self.num_proc,
                text_column=self.text_column,
                max_length=self.max_length,
            )
        has_words = self.masking != "token"
        if has_words and not tokenizer.is_fast:
            raise LitPeftError(
                f"data.masking {self.masking!r} needs to know which tokens make a word, and this tokenizer "
                f"({type(tokenizer).__name__}) does not say it: use masking 'token', or a fast tokenizer."
            )
        table = tokenize(
            rows,
            encode_text,
            tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            text_column=self.text_column,
            max_length=self.max_length,
            join_texts=self.join_texts,
            has_words=has_words,
        )
        if not len(table) and not self.streaming:
            raise LitPeftError(f"{rows.field} {rows.source!r}: the tokenizer knows none of its characters.")
        return table

    def collator(self, split: Split) -> PadCollator | MaskCollator:
        """As `LitDataModule.collator`, with masks; prediction has its own in the text."""
        pad = pad_collator(self)
        if split == "predict":
            return replace(pad, extra_keys=("texts",))
        tokenizer = self.tokenizer
        masks = self._masks(tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids))
        return MaskCollator(pad, masks, f"{self.seed} {split}")

    def to_show(self, example: dict[str, Any]) -> dict[str, Any]:
        """As `LitDataModule.to_show`, with masks; prediction has its own in the text."""
        if "labels" in example or "texts" in example:
            return example
        collator = self.collator("train")
        assert isinstance(collator, MaskCollator)
        ids, labels = collator.mask(example, f"{example['input_ids']}")
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def _masks(self, mask_token_id: int, vocabulary: int, special_ids: tuple[int, ...] = ()) -> Masking:
        shares = (self.mlm_probability, self.mask_replace_prob, self.random_replace_prob)
        return Masking(self.masking, *shares, mask_token_id, vocabulary, special_ids)


@dataclass(frozen=True)
class MaskCollator:
    """Masks examples and pads them.

    Attributes:
        pad: pads a batch.
        masks: chooses and replaces tokens.
        key: seeds the masks, with the place of an example in the epoch, or with its tokens if it has none.
    """

    pad: PadCollator
    masks: Masking
    key: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate a batch; see `PadCollator`."""
        if isinstance(examples, Drawn):
            keys = [f"{examples.key} {place}" for place in examples.places]
        else:
            keys = [f"{example['input_ids']}" for example in examples]
        masked = [self.mask(example, key) for example, key in zip(examples, keys, strict=True)]
        return self.pad([{"input_ids": ids, "labels": labels} for ids, labels in masked])

    def mask(self, example: dict[str, Any], key: str) -> tuple[Tensor, Tensor]:
        """Return the masked tokens of an example and the labels, see `Masking`."""
        return self.masks(example["input_ids"], example.get("words"), f"{self.key} {key}")


def encode_text(
    batch: dict[str, list[Any]], *, tokenizer: Any, text_column: str, max_length: int, join_texts: bool, has_words: bool
) -> dict[str, list[Any]]:
    """Tokenize texts and cut them, joined or one by one, into examples.

    Returns:
        `input_ids` and, with `has_words`, `words`: the number of each token's word, -1 for special tokens.
    """
    first, last = special_ends(tokenizer)
    size = max(max_length - len(first) - len(last), 1)
    between = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
    out: dict[str, list[Any]] = {"input_ids": [], **({"words": []} if has_words else {})}
    ids: list[int] = []
    words: list[int] = []

    def cut(whole: bool) -> None:
        """Move what has been gathered to the result; without `whole`, only full examples."""
        at = 0
        while len(ids) - at >= size or (whole and at < len(ids)):
            out["input_ids"].append([*first, *ids[at : at + size], *last])
            if has_words:
                out["words"].append([-1] * len(first) + words[at : at + size] + [-1] * len(last))
            at += size
        del ids[:at], words[:at]

    for tokens, numbers in _tokens_and_words([str(text) for text in batch[text_column]], tokenizer, has_words):
        if not tokens:
            continue
        if ids:
            ids += between
            words += [-1] * len(between)
        base = max(chain(words, [-1])) + 1
        ids += tokens
        words += [base + number for number in numbers]
        cut(whole=not join_texts)
    cut(whole=True)
    return out


def _tokens_and_words(texts: list[str], tokenizer: Any, has_words: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of each text and, with `has_words`, the numbers of their words."""
    pieces = [list(text_pieces(text)) for text in texts]
    flat = list(chain(*pieces))
    options = {"add_special_tokens": False, "return_offsets_mapping": has_words, "verbose": False}
    encoded: Any = tokenizer(flat, **options) if flat else None
    at = 0
    for parts in pieces:
        tokens: list[int] = []
        words: list[int] = []
        for piece in parts:
            tokens += encoded["input_ids"][at]
            if has_words:
                start = words[-1] + 1 if words else 0
                numbers = word_numbers(piece, encoded["offset_mapping"][at], encoded.word_ids(at))
                words += [start + number for number in numbers]
            at += 1
        yield tokens, words


def encode_prompts(
    batch: dict[str, list[Any]], *, tokenizer: Any, text_column: str, max_length: int
) -> dict[str, list[Any]]:
    """Tokenize texts that have mask tokens.

    Returns:
        `input_ids` and `texts`.

    Raises:
        RowError: a text has no mask token, or is too long.
    """
    texts = [str(text) for text in batch[text_column]]
    rows = tokenizer(texts, verbose=False)["input_ids"]
    for index, ids in enumerate(rows):
        if tokenizer.mask_token_id not in ids:
            raise RowError(
                index, f"there is nothing to fill in; write {tokenizer.mask_token} where a token is to be predicted."
            )
        if len(ids) > max_length:
            raise RowError(
                index, f"the text has {len(ids)} tokens, more than data.max_length {max_length}; shorten it."
            )
    return {"input_ids": rows, "texts": texts}
