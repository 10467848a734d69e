"""A source text and the target text to generate from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.collate import IGNORE, PadCollator
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import drop_cut_column, note_lost_labels, note_missing_end
from lit_peft.data.rows import Rows, Split, require_text, text_key
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset


class Seq2SeqData(LitDataModule):
    """Sources and targets: summarization, translation.

    A column may be a field of another: `translation.en`. Batches: `input_ids`, `attention_mask` [batch, length] and
    `labels` [batch, target length], -100 on padding; the model makes the decoder's inputs from them. Except for
    training, `references` are the whole targets as text.

    Args:
        source_column: column of the source text.
        target_column: column of the target text.
        prefix: put before every source, such as "summarize: ".
        max_target_length: maximum number of tokens of a target; longer targets are cut, which is reported.
        **common: see `LitDataModule`.
    """

    task = "seq2seq"

    def __init__(
        self,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        max_target_length: int = 128,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.source_column = source_column
        self.target_column = target_column
        self.prefix = prefix
        self.max_target_length = max_target_length
        if max_target_length < 2:
            raise LitPeftError(f"data.max_target_length is {max_target_length}; it must be at least 2.")

    def columns(self, split: Split) -> dict[str, str | None]:
        """The source and, except for prediction, the target."""
        needed: dict[str, str | None] = {"data.source_column": self.source_column}
        return needed if split == "predict" else {**needed, "data.target_column": self.target_column}

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The source."""
        return text_key(table, [self.source_column])

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a source and, except for prediction, a target."""
        require_text(rows, self.columns(split).values())
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens of source and target, each cut to its maximum length."""
        table = tokenize(
            rows,
            encode_pairs,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            source_column=self.source_column,
            target_column=None if split == "predict" else self.target_column,
            prefix=self.prefix,
            max_length=self.max_length,
            max_target_length=self.max_target_length,
            with_references=split != "train",
        )
        table = drop_cut_column(table, self.notes, split, "sources", self.max_length, column="source_cut")
        if split == "predict":
            return table
        # A tokenizer may add an end token without naming it as eos_token.
        if not self.tokenizer.num_special_tokens_to_add():
            note_missing_end(self.notes, self.tokenizer)
        lost = column_values(table, "target_cut")
        lengths = [len(labels) + cut for labels, cut in zip(column_values(table, "labels"), lost, strict=True)]
        table = drop_cut_column(
            table,
            self.notes,
            split,
            "targets",
            self.max_target_length,
            column="target_cut",
            setting="max_target_length",
        )
        note_lost_labels(self.notes, split, lengths, lengths, lost, self.max_target_length, setting="max_target_length")
        return table

    def collator(self, split: Split) -> Collate:
        """As `LitDataModule.collator`, with the targets padded separately."""
        return PairCollator(pad_collator(self))


@dataclass(frozen=True)
class PairCollator:
    """Pads sources as usual, and targets on the right to the longest target.

    Attributes:
        pad: pads the sources.
    """

    pad: PadCollator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        sources = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
        batch: dict[str, Any] = dict(self.pad(sources))
        batch.pop("token_type_ids", None)
        if "labels" in examples[0]:
            targets = [torch.tensor(example["labels"]) for example in examples]
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE)
        if "reference" in examples[0]:
            batch["references"] = [example["reference"] for example in examples]
        return batch


def encode_pairs(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    source_column: str,
    target_column: str | None,
    prefix: str,
    max_length: int,
    max_target_length: int,
    with_references: bool,
) -> dict[str, list[Any]]:
    """Tokenize sources and targets, and count the tokens that were cut from each."""
    sources = [prefix + str(text) for text in batch[source_column]]
    lengths = map(len, tokenizer(sources, verbose=False)["input_ids"])
    out: dict[str, list[Any]] = {"source_cut": [max(0, length - max_length) for length in lengths]}
    out["input_ids"] = tokenizer(sources, truncation=True, max_length=max_length)["input_ids"]
    if target_column is not None:
        targets = [str(text) for text in batch[target_column]]
        whole = [_add_end(list(ids), tokenizer) for ids in tokenizer(text_target=targets, verbose=False)["input_ids"]]
        out["target_cut"] = [max(0, len(ids) - max_target_length) for ids in whole]
        # The end token is kept, so that the model learns to stop.
        out["labels"] = [
            ids if len(ids) <= max_target_length else [*ids[: max_target_length - 1], ids[-1]] for ids in whole
        ]
        if with_references:
            out["reference"] = targets
    return out


def _add_end(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
