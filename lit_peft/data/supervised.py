"""What the data modules of causal models share: prompts, and text with the loss on a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.collate import IGNORE, PadCollator
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values
from lit_peft.data.notes import note_lost_labels, note_missing_end, share_of
from lit_peft.data.rows import RowError, Rows, Split
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

# What the chat template may leave out of an answer, in words.
_LEFT_OUT = {
    "content": "an answer of which the chat template leaves out a part, so that part is not learned",
    "reasoning": "reasoning that the chat template leaves out, so it is not learned",
    "tool calls": "tool calls that the chat template leaves out, so they are not learned: set data.chat_template to "
    "one for tools",
    "generation prompt": "an answer that does not continue the chat template's generation prompt, so generation starts "
    "differently from training",
}


class SupervisedData(LitDataModule):
    """Text for causal models with the loss on answers. What `max_length` cuts or drops is counted and reported.

    Args:
        train_on_inputs: compute the loss on the prompt too.
        packing: join training examples to rows of at most `max_length` tokens, `batch_size` rows per batch; no example
            attends to another. Not for methods with virtual tokens.
        **common: see `LitDataModule`.
    """

    task = "causal_lm"
    cuts_tokens = True
    learns_tokens = True
    # Whether examples can be packed.
    packs = True

    def __init__(self, train_on_inputs: bool = False, packing: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.train_on_inputs = train_on_inputs
        self.packing = packing
        if packing and self.group_by_length:
            raise LitPeftError(
                "data.packing and data.group_by_length are both set, but packed rows are full whatever the lengths of "
                "their examples; leave out group_by_length."
            )
        if packing and self.padding_side == "left":
            raise LitPeftError(
                "data.packing and data.padding_side 'left' are both set, but packed rows are padded on the right; "
                "leave out padding_side (prompts to continue are still padded on the left)."
            )

    def generates(self, split: Split) -> bool:
        """Tell whether a split's examples are prompts to continue."""
        return split == "predict"

    def collator(self, split: Split) -> PadCollator:
        """As `LitDataModule.collator`, but prompts are padded on the left, so that they can be continued."""
        collator = pad_collator(self)
        left = self.generates(split) and self.padding_side is None
        return replace(collator, padding_side="left") if left else collator

    @property
    def encoder(self) -> Any:
        """What turns texts into tokens: the tokenizer, unless a subclass has another."""
        return self.tokenizer

    def encode_supervised(self, rows: Rows, split: Split, function: Callable[..., Any], **settings: Any) -> Any:
        """Tokenize rows, and note what `max_length` cut.

        Args:
            rows: the rows to tokenize.
            split: the split they belong to.
            function: see `tokenize`; it returns the columns of `encode_answers`. It is called with `max_length`,
                `train_on_inputs`, `prompts_only` and `settings`.
            **settings: see `tokenize`.

        Raises:
            LitPeftError: no row is left, unless they are a block of a stream.
        """
        table = tokenize(
            rows,
            function,
            self.encoder,
            f"Tokenizing {split}",
            self.num_proc,
            max_length=self.max_length,
            train_on_inputs=self.train_on_inputs,
            prompts_only=self.generates(split),
            **settings,
        )
        lengths = column_values(table, "length")
        if self.generates(split):
            self._note_cut_rows(split, lengths, "start")
            return table.remove_columns("length")
        note_missing_end(self.notes, self.tokenizer)
        kept = [index for index, is_kept in enumerate(column_values(table, "kept")) if is_kept]
        # Other blocks of a stream may have rows that fit.
        if not kept and not self.streaming:
            raise LitPeftError(
                f"data.max_length is {self.max_length}, and no prompt of data.{split} leaves room for its answer; "
                "raise it."
            )
        if len(table) > len(rows):
            self.notes.add(
                f"data.{split}: {len(rows):,} chat(s) give {len(table):,} examples, because the chat template renders "
                "earlier answers differently; each is learned as it is when it is the last one."
            )
        if len(kept) < len(table):
            items = "rows" if len(table) == len(rows) else "examples"
            self.notes.add(
                f"data.{split}: {share_of(len(table) - len(kept), len(table), items)} dropped, because "
                f"data.max_length {self.max_length} leaves nothing of their answers."
            )
        if "left_out" in table.column_names:
            self._note_left_out(split, column_values(table, "left_out"))
            table = table.remove_columns("left_out")
        self._note_cut_rows(split, [lengths[index] for index in kept], "end")
        supervised, lost = column_values(table, "supervised"), column_values(table, "lost")
        note_lost_labels(self.notes, split, lengths, supervised, lost, self.max_length)
        table = table.select(kept) if len(kept) < len(table) else table
        return table.remove_columns(["length", "supervised", "lost", "kept"])

    def _note_left_out(self, split: Split, found: list[str]) -> None:
        for part in sorted({part for parts in found for part in parts.split(",") if part}):
            count = sum(part in parts.split(",") for parts in found)
            self.notes.add(
                f"data.{split}: {share_of(count, len(found), 'examples')} with {_LEFT_OUT[part]}.",
                warn=part != "generation prompt",
            )

    def _note_cut_rows(self, split: Split, lengths: list[int], end: str) -> None:
        cuts = [length - self.max_length for length in lengths if length > self.max_length]
        if cuts:
            self.notes.add(
                f"data.{split}: {share_of(len(cuts), len(lengths), 'rows')} cut to {self.max_length} tokens at the "
                f"{end} (data.max_length); {share_of(sum(cuts), sum(lengths), 'tokens')} lost."
            )


def encode_answers(
    prompts: list[str],
    answers: list[str] | None,
    *,
    tokenizer: Any,
    max_length: int,
    train_on_inputs: bool,
    prompts_only: bool,
) -> dict[str, list[Any]]:
    """Tokenize prompts and, separately, their answers, each of which ends with the end-of-text token.

    Returns:
        `input_ids`, `labels` (-100 on the prompt, unless `train_on_inputs`), `length` before cutting, `supervised`
        (number of tokens to learn), `lost` (number of those that were cut) and `kept` (whether any is left). For
        prompts, which are cut at their start, `input_ids` and `length` only.

    Raises:
        RowError: an answer has no token to predict.
    """
    heads = [strip_end_tokens(ids, tokenizer) for ids in tokenizer(prompts, verbose=False)["input_ids"]]
    if prompts_only or answers is None:
        return {"input_ids": [ids[-max_length:] for ids in heads], "length": [len(ids) for ids in heads]}
    tails = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
    out: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "length", "supervised", "lost", "kept")}
    for index, (head, tail, answer) in enumerate(zip(heads, tails, answers, strict=True)):
        tail = list(tail) + end_of_text(tokenizer)
        # The first token of a row is not predicted.
        if not (head + tail)[max(len(head), 1) :]:
            raise RowError(
                index,
                f"the answer {brief(answer)} has no tokens to learn: the tokenizer knows none of its characters; "
                "remove the row.",
            )
        labels = (head if train_on_inputs else [IGNORE] * len(head)) + tail
        add_supervised(out, head + tail, labels, max_length)
        if len(head) >= max_length:
            # Nothing of the answer is left, even if the prompt is learned too.
            out["lost"][-1], out["kept"][-1] = out["supervised"][-1], False
    return out


def add_supervised(out: dict[str, list[Any]], ids: list[int], labels: list[int], max_length: int) -> None:
    """Append an example cut to `max_length`, and count its supervised tokens; the first token is not predicted.

    `supervised` is the number of supervised tokens before cutting, `lost` the number of those cut, and `kept` whether
    any is left.
    """
    supervised = sum(label != IGNORE for label in labels[1:])
    left = sum(label != IGNORE for label in labels[1:max_length])
    out["input_ids"].append(ids[:max_length])
    out["labels"].append(labels[:max_length])
    out["length"].append(len(ids))
    out["supervised"].append(supervised)
    out["lost"].append(supervised - left)
    out["kept"].append(left > 0)


def end_of_text(tokenizer: Any) -> list[int]:
    """Return the end-of-text token as a list; empty if the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def strip_end_tokens(ids: list[int], tokenizer: Any) -> list[int]:
    """Drop the end tokens that some tokenizers add, because the text continues.

    A text without tokens starts with the token that opens texts or, if there is none, ends them.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = list(ids) or ([] if first is None else [first])
    while len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids
