"""Text to continue: raw text, or prompts with their completions."""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import Rows, Split
from lit_peft.data.supervised import SupervisedData, end_of_text, join_answers, open_ended
from lit_peft.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset


class CausalLMData(SupervisedData):
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
        **common: see `SupervisedData` and `LitDataModule`.
    """

    def __init__(
        self,
        text_column: str = "text",
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        completion_column: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text_column = text_column
        self.prompt_template = prompt_template or f"{{{prompt_column}}}"
        self.completion_column = completion_column
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
        if self.completion_column is None:
            return self.tokenized(
                rows,
                encode_text,
                f"Tokenizing {split}",
                text_column=self.text_column,
                max_length=self.max_length,
                prompts=self.generates(split),
            )
        return self.supervised(
            rows,
            split,
            encode_completions,
            prompt_template=self.prompt_template,
            prompt_columns=self._prompt_columns,
            completion_column=self.completion_column,
        )


def encode_text(
    batch: dict[str, list[Any]], *, tokenizer: Any, text_column: str, max_length: int, prompts: bool
) -> dict[str, list[Any]]:
    """Tokenize raw text into consecutive pieces; prompts to continue keep their last `max_length` tokens."""
    texts = [str(text) for text in batch[text_column]]
    rows = [open_ended(ids, tokenizer) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    if prompts:
        return {"input_ids": [ids[-max_length:] for ids in rows]}
    pieces = []
    for ids in rows:
        ids = ids + end_of_text(tokenizer)
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
    prompts: bool,
    **settings: Any,
) -> dict[str, list[Any]]:
    """Fill the template from the columns, and tokenize prompts and completions; see `join_answers`."""
    count = len(batch[prompt_columns[0]])
    # Empty cells are empty text.
    cells = [{name: batch[name][at] or "" for name in prompt_columns} for at in range(count)]
    texts = [prompt_template.format(**cell) for cell in cells]
    answers = None if prompts else [str(text) for text in batch[completion_column]]
    return join_answers(texts, answers, tokenizer=tokenizer, prompts_only=prompts, **settings)
