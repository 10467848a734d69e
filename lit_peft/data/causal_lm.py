"""Text to continue: raw text, or prompts with their completions."""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from lit_peft.data.chats import encode_chats
from lit_peft.data.conversations import Form
from lit_peft.data.encoding import tokenize
from lit_peft.data.long_texts import token_ids
from lit_peft.data.notes import drop_cut_column, note_missing_end
from lit_peft.data.rows import Rows, Split, require_text, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.data.supervised import SupervisedData, encode_answers, end_of_text, strip_end_tokens
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset


class CausalLMData(SupervisedData):
    """Next-token prediction on raw text, or on completions of prompts.

    With `completion_column`, a row is a prompt (`prompt_column`, or `prompt_template` filled from the row's columns)
    and its completion, and the loss is on the completion only. If the tokenizer has a chat template, both are rendered
    by it, as the user's and the assistant's turn; `template: plain` keeps the plain text. Without the column, a row is
    raw text, split into consecutive examples of `max_length` tokens, so that nothing is lost. An end-of-text token ends
    each row. Batches: `input_ids`, `attention_mask`, `labels`, all [batch, length]; labels are -100 where there is no
    loss. Prediction reads prompts (or the raw text), padded on the left.

    Args:
        text_column: column of the raw text.
        prompt_column: column of the prompt.
        prompt_template: the prompt with columns in braces, instead of `prompt_column`, e.g. `"{instruction}\\n"`.
        completion_column: column of the completion.
        template: `chat`, for prompts and completions as turns of a chat; or `plain`. Unset: `chat` if the tokenizer
            has a chat template and `prompt_template` is not set.
        **common: see `SupervisedData` and `LitDataModule`.
    """

    def __init__(
        self,
        text_column: str = "text",
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        completion_column: str | None = None,
        template: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text_column = text_column
        self.completion_column = completion_column
        self.prompt_template = prompt_template
        self.template = template
        if template not in (None, "chat", "plain"):
            raise LitPeftError(f"data.template {template!r} is not known: use 'chat' or 'plain'.")
        if prompt_template is None:
            # Not a template, because a column's name may contain braces.
            fields = [prompt_column]
        else:
            refuse_unused("with data.prompt_template", {"prompt_column": prompt_column != "prompt"})
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(prompt_template) if name is not None]
            except ValueError as problem:
                raise LitPeftError(
                    f"data.prompt_template {prompt_template!r} is not a valid template: {problem}; correct it."
                ) from None
            if not all(fields) or not fields:
                raise LitPeftError(
                    f"data.prompt_template {prompt_template!r} names no column; name one in braces, such as "
                    "'{instruction}'."
                )
        if completion_column is None:
            refuse_unused(
                "without data.completion_column, because a row is then the raw text in data.text_column",
                {
                    "prompt_template": prompt_template is not None,
                    "prompt_column": prompt_column != "prompt",
                    "truncation_side 'left'": self.truncation_side == "left",
                    "template": template is not None,
                },
            )
        else:
            refuse_unused("with data.completion_column", {"text_column": text_column != "text"})
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
        return text_key(table, [self.text_column] if self.completion_column is None else self._prompt_columns)

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a text, or a completion."""
        if self.completion_column is None:
            require_text(rows, [self.text_column], longest=None)
        elif split != "predict":
            require_text(rows, [self.completion_column])
        if self.completion_column is not None:
            require_text(rows, self._prompt_columns, may_be_empty=True)
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels, at most `max_length` per example."""
        if self.completion_column is not None:
            as_chat = self.template == "chat"
            has_template = bool(getattr(self.tokenizer, "chat_template", None))
            if as_chat and not has_template:
                raise LitPeftError(
                    f"data.template is 'chat', but the tokenizer of {self.base!r} has no chat template; use 'plain'."
                )
            if self.template is None and self.prompt_template is None and has_template:
                as_chat = True
                self.notes.add(
                    f"{rows.field}: prompts and completions, rendered by the tokenizer's chat template; data.template "
                    "'plain' keeps the plain text."
                )
            return self.encode_supervised(
                rows,
                split,
                encode_completions,
                prompt_template=self.prompt_template,
                prompt_columns=self._prompt_columns,
                completion_column=self.completion_column,
                as_chat=as_chat,
            )
        table = tokenize(
            rows,
            encode_text,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            text_column=self.text_column,
            max_length=self.max_length,
            prompts_only=self.generates(split),
        )
        if self.generates(split):
            return drop_cut_column(table, self.notes, split, "prompts", self.max_length)
        note_missing_end(self.notes, self.tokenizer)
        if not len(table) and not self.streaming:
            raise LitPeftError(
                f"{rows.field} {rows.source!r}: no row has two tokens, so there is nothing to predict; give longer "
                "texts."
            )
        return table


def encode_text(
    batch: dict[str, list[Any]], *, tokenizer: Any, text_column: str, max_length: int, prompts_only: bool
) -> dict[str, list[Any]]:
    """Tokenize raw text and split it into consecutive pieces; prompts to continue keep their last `max_length` tokens.

    For prompts, `cut` is the number of tokens that were cut.
    """
    texts = [str(text) for text in batch[text_column]]
    rows = [strip_end_tokens(ids, tokenizer) for ids in token_ids(texts, tokenizer)]
    if prompts_only:
        cut = [max(0, len(ids) - max_length) for ids in rows]
        return {"input_ids": [ids[-max_length:] for ids in rows], "cut": cut}
    pieces = []
    for ids in rows:
        ids = ids + end_of_text(tokenizer)
        # A single token has nothing to predict.
        starts = [start for start in range(0, len(ids), max_length) if len(ids) - start > 1]
        pieces += [ids[start : start + max_length] for start in starts]
    return {"input_ids": pieces, "labels": pieces}


class _ColumnFormatter(string.Formatter):
    """Takes the whole field name as a column's name, so that `{a.b}` is the column "a.b"."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def _fill_prompt_template(template: str, cells: dict[str, Any]) -> str:
    try:
        return _ColumnFormatter().vformat(template, (), cells)
    except (ValueError, TypeError) as problem:  # of a format that follows the column's name
        raise LitPeftError(
            f"data.prompt_template {template!r} does not fit {brief(cells)}: {problem}; correct it."
        ) from None


def encode_completions(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    prompt_template: str | None,
    prompt_columns: list[str],
    completion_column: str,
    as_chat: bool,
    prompts_only: bool,
    **settings: Any,
) -> dict[str, list[Any]]:
    """Fill the template from the columns, and tokenize prompts and completions.

    See `encode_answers` or, with `as_chat`, `encode_chats`.
    """
    count = len(batch[prompt_columns[0]])
    # Empty cells become empty text; the number 0 does not.
    cells = [
        {name: "" if (cell := batch[name][index]) is None else cell for name in prompt_columns}
        for index in range(count)
    ]
    if prompt_template is None:
        texts = [str(cell[prompt_columns[0]]) for cell in cells]
    else:
        texts = [_fill_prompt_template(prompt_template, cell) for cell in cells]
    answers = None if prompts_only else [str(text) for text in batch[completion_column]]
    if as_chat:
        return encode_chats(
            {"prompt": texts, "completion": answers or [None] * count},
            tokenizer=tokenizer,
            form=Form("prompt_completion", "prompt", "completion"),
            template_columns=(),
            filled_columns=(),
            learn="answers",
            prompts_only=prompts_only,
            **settings,
        )
    return encode_answers(texts, answers, tokenizer=tokenizer, prompts_only=prompts_only, **settings)
