"""Text to continue: raw text, or prompts with their completions."""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import Rows, Split, refuse_unread
from lit_peft.data.supervised import SupervisedData, end_of_text, join_answers, open_ended
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

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
        self.completion_column = completion_column
        # Without a template, the name of the prompt's column may be any.
        self.prompt_template = prompt_template
        if prompt_template is None:
            fields = [prompt_column]
        else:
            refuse_unread("with data.prompt_template", {"prompt_column": prompt_column != "prompt"})
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(prompt_template) if name is not None]
            except ValueError as problem:
                raise LitPeftError(f"data.prompt_template {prompt_template!r} is not a template: {problem}.") from None
            if not all(fields) or not fields:
                raise LitPeftError(
                    f"data.prompt_template {prompt_template!r} names no column, such as '{{instruction}}'."
                )
        if completion_column is None:
            refuse_unread(
                "without data.completion_column, where a row is the raw text in data.text_column",
                {"prompt_template": prompt_template is not None, "prompt_column": prompt_column != "prompt"},
            )
        else:
            refuse_unread("with data.completion_column", {"text_column": text_column != "text"})
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
        if self.completion_column is not None:
            self.require_text(rows, self._prompt_columns, may_be_empty=True)
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels, at most `max_length` of them to an example."""
        if self.completion_column is None:
            table = self.tokenized(
                rows,
                encode_text,
                f"Tokenizing {split}",
                text_column=self.text_column,
                max_length=self.max_length,
                prompts=self.generates(split),
            )
            if self.generates(split):
                return self.without_cuts(table, split, "prompts")
            if not len(table) and not self.streaming:
                raise LitPeftError(f"{rows.field} {rows.source!r}: no row has two tokens, so there is none to predict.")
            return table
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
    """Tokenize raw text into consecutive pieces; prompts to continue keep their last `max_length` tokens.

    Of prompts, `cut` is how many tokens were cut away.
    """
    texts = [str(text) for text in batch[text_column]]
    rows = [open_ended(ids, tokenizer) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    if prompts:
        cut = [max(0, len(ids) - max_length) for ids in rows]
        return {"input_ids": [ids[-max_length:] for ids in rows], "cut": cut}
    pieces = []
    for ids in rows:
        ids = ids + end_of_text(tokenizer)
        # A single token has nothing to predict.
        pieces += [ids[at : at + max_length] for at in range(0, len(ids), max_length) if len(ids) - at > 1]
    return {"input_ids": pieces, "labels": pieces}


class _Columns(string.Formatter):
    """Takes the whole of a field's name for a column's: `{a.b}` is a column, too."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def _filled(template: str, cells: dict[str, Any]) -> str:
    try:
        return _Columns().vformat(template, (), cells)
    except (ValueError, TypeError) as problem:  # of what stands behind a column's name
        raise LitPeftError(f"data.prompt_template {template!r} does not fit {brief(cells)}: {problem}.") from None


def encode_completions(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    prompt_template: str | None,
    prompt_columns: list[str],
    completion_column: str,
    prompts: bool,
    **settings: Any,
) -> dict[str, list[Any]]:
    """Fill the template from the columns, and tokenize prompts and completions; see `join_answers`."""
    count = len(batch[prompt_columns[0]])
    # Empty cells are empty text.
    cells = [
        {name: "" if (cell := batch[name][at]) is None else cell for name in prompt_columns} for at in range(count)
    ]
    if prompt_template is None:
        texts = [str(cell[prompt_columns[0]]) for cell in cells]
    else:
        texts = [_filled(prompt_template, cell) for cell in cells]
    answers = None if prompts else [str(text) for text in batch[completion_column]]
    return join_answers(texts, answers, tokenizer=tokenizer, prompts_only=prompts, **settings)
