"""What data modules for causal models share: prompts, and text with the loss on a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lit_peft.data.base import LitDataModule, Rows, Split, lengths_of
from lit_peft.data.collate import IGNORE, PadCollator
from lit_peft.data.files import column_values
from lit_peft.data.packing import PackCollator
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief


class SupervisedData(LitDataModule):
    """Text for causal models with the loss on answers. What is cut, and what is dropped for it, is counted and told.

    Args:
        train_on_inputs: put the loss on the prompt as well.
        packing: join training examples to rows of at most `max_length` tokens, `batch_size` of them to a batch; no
            example sees another. Not for methods with virtual tokens.
        **common: see `LitDataModule`.
    """

    def __init__(self, train_on_inputs: bool = False, packing: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.train_on_inputs = train_on_inputs
        self.packing = packing
        if packing and self.group_by_length:
            raise LitPeftError(
                "data.packing and data.group_by_length are both set: packed rows are full, whatever the lengths of "
                "their examples; leave group_by_length out."
            )
        if packing and self.padding_side == "left":
            raise LitPeftError(
                "data.packing and data.padding_side 'left' are both set, and packed rows are padded right: leave "
                "padding_side out (prompts to continue are padded on the left then)."
            )
        if packing and self.streaming:
            raise LitPeftError(
                "data.packing and data.streaming are both set, and rows are packed by the lengths of all examples, "
                "which are not known before they are read: leave one of them out."
            )

    def _grouping(self) -> dict[str, Any]:
        if not self.packing:
            return super()._grouping()
        return {"lengths": lengths_of(self.examples("train")), "capacity": self.max_length}

    def _train_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        if not self.packing:
            return super()._train_collator()
        return PackCollator(self.tokenizer.pad_token_id, self.pad_to_multiple_of)

    def generates(self, split: Split) -> bool:
        """Tell whether a split's examples are prompts to continue."""
        return split == "predict"

    def collator(self, split: Split) -> PadCollator:
        """As `LitDataModule.collator`, but prompts are padded on the left, to be continued."""
        collator = self.padding()
        left = self.generates(split) and self.padding_side is None
        return replace(collator, padding_side="left") if left else collator

    def supervised(self, rows: Rows, split: Split, function: Callable[..., Any], **settings: Any) -> Any:
        """Tokenize rows and say what `max_length` took away.

        Args:
            rows: what to tokenize.
            split: which split they are.
            function: as for `tokenized`; it gives `input_ids`, `length` (before cutting) and, except for prompts,
                `labels`, and leaves out rows without a supervised token within `max_length`. Called with
                `max_length`, `train_on_inputs` and `prompts` (whether to give prompts alone) besides `settings`.
            **settings: see `tokenized`.

        Raises:
            LitPeftError: no row is left, unless they are a block of a stream.
        """
        table = self.tokenized(
            rows,
            function,
            f"Tokenizing {split}",
            max_length=self.max_length,
            train_on_inputs=self.train_on_inputs,
            prompts=self.generates(split),
            **settings,
        )
        dropped = len(rows) - len(table)
        # Of a stream, these are a few rows: others may have what they have not.
        if not len(table) and not self.streaming:
            raise LitPeftError(
                f"data.max_length is {self.max_length}, and no prompt of data.{split} leaves room for its answer; "
                "raise it."
            )
        if dropped:
            self.say(f"data.{split}: {dropped:,} row(s) dropped: data.max_length leaves nothing of their answers.")
        if not len(table):
            return table
        lengths = column_values(table, "length")
        lost = [length - self.max_length for length in lengths if length > self.max_length]
        if lost:
            share = 100 * sum(lost) / sum(lengths)
            end = "start" if self.generates(split) else "end"
            self.say(
                f"data.{split}: {len(lost):,} of {len(table):,} rows cut to {self.max_length} tokens at the {end} "
                f"(data.max_length); {sum(lost):,} tokens lost, {share:.1f} %."
            )
        return table.remove_columns("length")


def join_answers(
    prompts: list[str],
    answers: list[str] | None,
    *,
    tokenizer: Any,
    max_length: int,
    train_on_inputs: bool,
    prompts_only: bool,
) -> dict[str, list[Any]]:
    """Tokenize prompts and, apart, their answers, each closed by an end-of-text token.

    Returns:
        `input_ids`, `labels` (-100 on the prompt, unless `train_on_inputs`), `length` before cutting; rows
        whose answer would be cut away whole are left out. Prompts alone are cut at their start.

    Raises:
        LitPeftError: an answer has no token to predict.
    """
    heads = [open_ended(ids, tokenizer) for ids in tokenizer(prompts, verbose=False)["input_ids"]]
    if prompts_only or answers is None:
        return {"input_ids": [ids[-max_length:] for ids in heads], "length": [len(ids) for ids in heads]}
    tails = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
    out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    for head, tail, answer in zip(heads, tails, answers, strict=True):
        if len(head) >= max_length:
            continue
        tail = list(tail) + end_of_text(tokenizer)
        # The first token of a row is not predicted.
        if not (head + tail)[max(len(head), 1) :]:
            raise LitPeftError(
                f"The answer {brief(answer)} has no tokens to learn: the tokenizer knows none in it; remove the row."
            )
        labels = (head if train_on_inputs else [IGNORE] * len(head)) + tail
        out["input_ids"].append((head + tail)[:max_length])
        out["labels"].append(labels[:max_length])
        out["length"].append(len(head) + len(tail))
    return out


def end_of_text(tokenizer: Any) -> list[int]:
    """Return the token that closes a text, as a list; empty if the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def open_ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Drop the closing tokens that some tokenizers add by themselves: the text goes on.

    A text without tokens goes on from the one that opens texts, or else closes them.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = list(ids) or ([] if first is None else [first])
    while len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids
