"""Text to continue: raw text, or prompts with their completions."""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, Rows, Split
from lit_peft.data.collate import IGNORE, PadCollator
from lit_peft.data.files import column_values
from lit_peft.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset


class CausalLMData(LitDataModule):
    """Next-token prediction on raw text, or on completions of prompts.

    With `completion_column`, a row is a prompt (`prompt_column`, or `prompt_template` filled from the row's columns)
    and its completion, and the loss is on the completion only. Without it, a row is raw text, cut into consecutive
    examples of `max_length` tokens: nothing is lost. An end-of-text token closes each row. Batches: `input_ids`,
    `attention_mask`, `labels`, all [batch, length]; labels are -100 where there is no loss. Prediction takes prompts
    (or the raw text), padded on the left.

    Args:
        text_column: column of the raw text.
        prompt_column: column of the prompt.
        prompt_template: the prompt with columns in braces, instead of `prompt_column`, e.g. `"{instruction}\\n"`.
        completion_column: column of the completion.
        train_on_inputs: put the loss on the prompt as well.
        **common: see `LitDataModule`.
    """

    def __init__(
        self,
        text_column: str = "text",
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        completion_column: str | None = None,
        train_on_inputs: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text_column = text_column
        self.prompt_template = prompt_template or f"{{{prompt_column}}}"
        self.completion_column = completion_column
        self.train_on_inputs = train_on_inputs
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.prompt_template) if name]
        except ValueError as problem:
            raise LitPeftError(f"data.prompt_template {prompt_template!r} is not a template: {problem}.") from None
        if not fields:
            raise LitPeftError(f"data.prompt_template {prompt_template!r} names no column, such as '{{instruction}}'.")
        self._prompt_columns = list(dict.fromkeys(fields))

    def columns(self, split: Split) -> dict[str, str | None]:
        """The text column; or those of the prompt and, except for prediction, of the completion."""
        if self.completion_column is None:
            return {"data.text_column": self.text_column}
        needed: dict[str, str | None] = {f"prompt column {name!r}": name for name in self._prompt_columns}
        if split != "predict":
            needed["data.completion_column"] = self.completion_column
        return needed

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The text, or the prompt."""
        return self.text_key(table, [self.text_column] if self.completion_column is None else self._prompt_columns)

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a text, or a completion."""
        if self.completion_column is None:
            self.require_text(rows, [self.text_column])
        elif split != "predict":
            self.require_text(rows, [self.completion_column])
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels, at most `max_length` of them to an example."""
        settings = {"max_length": self.max_length, "prompts": split == "predict"}
        if self.completion_column is None:
            return self.tokenized(rows, encode_text, f"Tokenizing {split}", text_column=self.text_column, **settings)
        table = self.tokenized(
            rows,
            encode_completions,
            f"Tokenizing {split}",
            prompt_template=self.prompt_template,
            prompt_columns=self._prompt_columns,
            completion_column=self.completion_column,
            train_on_inputs=self.train_on_inputs,
            **settings,
        )
        cut = sum(length > self.max_length for length in column_values(table, "length"))
        dropped = len(rows) - len(table)
        if cut:
            self.say(f"data.{split}: {cut} of {len(table)} rows cut to {self.max_length} tokens (data.max_length).")
        if dropped:
            self.say(f"data.{split}: {dropped} row(s) dropped: their prompts leave no room for a completion.")
        if not len(table):
            raise LitPeftError(
                f"data.max_length is {self.max_length}, and no prompt of data.{split} leaves room for its completion; "
                "raise it."
            )
        return table.remove_columns("length")

    def collator(self, split: Split) -> PadCollator:
        """As `LitDataModule.collator`, but prompts are padded on the left, to be continued."""
        collator = self.padding()
        prompts = split == "predict" and self.padding_side is None
        return replace(collator, padding_side="left") if prompts else collator


def encode_text(
    batch: dict[str, list[Any]], *, tokenizer: Any, text_column: str, max_length: int, prompts: bool
) -> dict[str, list[Any]]:
    """Tokenize raw text into consecutive pieces; prompts to continue keep their last `max_length` tokens."""
    texts = [str(text) for text in batch[text_column]]
    rows = [_open_ended(ids, tokenizer) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    if prompts:
        return {"input_ids": [ids[-max_length:] for ids in rows]}
    pieces = []
    for ids in rows:
        ids = ids + _end(tokenizer)
        # A single token has nothing to predict.
        pieces += [ids[at : at + max_length] for at in range(0, len(ids), max_length) if len(ids) - at > 1]
    return {"input_ids": pieces, "labels": pieces}


def encode_completions(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    prompt_template: str,
    prompt_columns: list[str],
    completion_column: str,
    train_on_inputs: bool,
    max_length: int,
    prompts: bool,
) -> dict[str, list[Any]]:
    """Tokenize prompts and completions; rows whose completion would be cut away whole are left out."""
    count = len(batch[prompt_columns[0]])
    # Empty cells (Alpaca's input) are empty text.
    cells = [{name: batch[name][at] or "" for name in prompt_columns} for at in range(count)]
    heads = [
        _open_ended(ids, tokenizer)
        for ids in tokenizer([prompt_template.format(**cell) for cell in cells], verbose=False)["input_ids"]
    ]
    if prompts:
        return {"input_ids": [ids[-max_length:] for ids in heads], "length": [len(ids) for ids in heads]}
    answers = [str(text) for text in batch[completion_column]]
    tails = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
    out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    for head, tail in zip(heads, tails, strict=True):
        if len(head) >= max_length:
            continue
        tail = list(tail) + _end(tokenizer)
        labels = (head if train_on_inputs else [IGNORE] * len(head)) + tail
        out["input_ids"].append((head + tail)[:max_length])
        out["labels"].append(labels[:max_length])
        out["length"].append(len(head) + len(tail))
    return out


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _open_ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Drop the closing tokens that some tokenizers add by themselves: the text goes on."""
    ids = list(ids)
    while len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids
