"""Instructions with their answers: Alpaca's form, and chats."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.chat_rendering import ChatRenderer, unused_fields
from lit_peft.data.chats import (
    TEMPLATE_COLUMNS,
    chat_problem,
    check_learn,
    encode_chats,
    learned_turns,
    read_row,
    template_fields,
)
from lit_peft.data.conversations import Form, check_format, find_form
from lit_peft.data.files import column_values
from lit_peft.data.notes import share_of
from lit_peft.data.prompt_templates import TEMPLATES, fill_template, parse_history
from lit_peft.data.rows import RowError, Rows, Split, first_values, require_text, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.data.supervised import SupervisedData, encode_answers
from lit_peft.models.tokenization import stop_tokens
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset


class InstructionData(SupervisedData):
    """Chats, or instructions and prompts with their answers, with the loss on the answers only.

    Chats are messages of OpenAI's form (`{role, content}`, with text, text parts, tool calls and their results) or of
    ShareGPT's (`{from, value}`). Prompts and completions are text, or messages. Instructions have Alpaca's form: an
    instruction, an output and optionally an input, a system prompt and a history of earlier [instruction, answer]
    pairs. The form is found from the columns, unless `format` or `messages_column` names it.

    Chats are rendered by the tokenizer's chat template, and so are prompts and instructions if there is one; `template`
    keeps Alpaca's form. The loss is on what the model generates: the assistant's turns, with their reasoning, tool
    calls and end-of-turn tokens (see `learn`), except for messages with `weight: 0`, `train: false` or `training:
    false`. If the chat template marks the assistant's text with `{% generation %}`, the marks decide. If it renders
    earlier turns differently, for example without their reasoning, a chat gives several examples, each of which ends
    with a turn as the model generates it. A row's system prompt becomes the first message, and the columns `tools`,
    `documents` and `chat_template_kwargs`, if the file has them, are given to the chat template.

    Batches: `input_ids`, `attention_mask`, `labels`, all [batch, length]; labels are -100 where there is no loss.
    Prediction reads prompts, padded on the left; of a chat, everything before the assistant's last turn.

    Args:
        instruction_column: column of the instruction.
        input_column: column of the input; optional in rows and in files.
        output_column: column of the answer.
        template: how instructions and prompts are rendered: `chat`, by the tokenizer's chat template; `alpaca`;
            `llm_adapters` (see `fill_template`); or `plain`, the prompt alone. Unset: `chat` if there is a chat
            template, else `alpaca` for instructions and `plain` for prompts.
        messages_column: column of the messages; unset: it is found.
        chat_template: the chat template, or a file with it (also `pkg:DISTRIBUTION/path`), instead of the tokenizer's.
        system_column: column of the system prompt; optional in rows and in files.
        history_column: column of the earlier instructions and answers; optional in rows and in files.
        format: `messages`, `sharegpt`, `prompt_completion` or `alpaca`; unset: it is found from the columns.
        learn: what is learned of a chat: `answers` (all turns of the assistant), `last_answer`, or a list of roles.
        **common: see `SupervisedData` and `LitDataModule`.
    """

    # Whether `template` can render rows in another way than by the chat template.
    takes_template = True

    def __init__(
        self,
        instruction_column: str = "instruction",
        input_column: str = "input",
        output_column: str = "output",
        template: str | None = None,
        messages_column: str | None = None,
        chat_template: str | None = None,
        system_column: str = "system",
        history_column: str = "history",
        format: str | None = None,
        learn: str | list[str] = "answers",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.instruction_column = instruction_column
        self.input_column = input_column
        self.output_column = output_column
        self.template = template
        self.messages_column = messages_column
        self.chat_template = chat_template
        self.system_column = system_column
        self.history_column = history_column
        self.format = format
        self.learn = learn
        self._checked_end = False
        check_format(format)
        check_learn(learn)
        alpaca = Form("alpaca", instruction_column, output_column, input_column, system_column, history_column)
        self._alpaca = alpaca
        # The form of each split's table, and of the one that was read last.
        self._forms: dict[Split, Form] = {}
        self._form = find_form({}, alpaca, format, messages_column)
        # Until a table is read, it is not known whether its rows are rendered by a chat template.
        self.optional_columns = self._form.optional
        if template not in (None, "chat", *TEMPLATES):
            raise LitPeftError(
                f"data.template {template!r} is not known: use {closest(str(template), ('chat', *TEMPLATES))}."
            )
        refuse_unused(
            f"with data.template {template!r}",
            {
                "chat_template": chat_template is not None and template in TEMPLATES,
                "learn": learn != "answers" and template in TEMPLATES,
            },
        )
        refuse_unused("with data.train_on_inputs", {"learn": learn != "answers" and self.train_on_inputs})
        instructions = {
            "instruction_column": instruction_column != "instruction",
            "input_column": input_column != "input",
            "output_column": output_column != "output",
            "template": template not in (None, "chat"),
            "history_column": history_column != "history",
        }
        if messages_column is not None:
            refuse_unused("with data.messages_column", instructions)
            wrong = format in ("alpaca", "prompt_completion")
            refuse_unused(f"with data.format {format!r}", {"messages_column": wrong})
        elif format in ("messages", "sharegpt"):
            refuse_unused(f"with data.format {format!r}", instructions)

    def columns(self, split: Split) -> dict[str, str | None]:
        """The columns of the messages; or of the prompt and, except for prediction, of the answer."""
        form = self._forms.get(split, self._form)
        if form.second is None:
            return {"data.messages_column": form.first}
        names = ("data.instruction_column", "data.output_column")
        if form.kind == "prompt_completion":
            names = ("data.format prompt_completion", "data.format prompt_completion, the answer")
        needed: dict[str, str | None] = {names[0]: form.first}
        if split != "predict":
            needed[names[1]] = form.second
        return needed

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; it also finds the form of the rows, and notes it."""
        form = self.form_of(table)
        self._forms[split] = self._form = form
        self.optional_columns = self._optional_columns(form)
        if set(form.columns) <= set(table.column_names):
            style = self.style(form)
            by = "rendered by the tokenizer's chat template" if style == "chat" else f"in the form {style!r}"
            if style == "chat" and not form.has_messages and self.template is None and self.takes_template:
                kept = "'alpaca' keeps Alpaca's form" if form.kind == "alpaca" else "'plain' keeps the plain text"
                self.notes.add(f"{field}: {form.describe()}, {by}; data.template {kept}.")
            elif form.kind != "alpaca" and self.messages_column is None:
                self.notes.add(f"{field}: {form.describe()}, {by}.")
        return super().prepare_table(table, split, field, source)

    def form_of(self, table: Dataset) -> Form:
        """Return how the rows of a table write a conversation."""
        values = first_values(table)
        form = find_form(values, self._alpaca, self.format, self.messages_column)
        if self.format is not None or self.messages_column is not None:
            return form
        # Files of several forms, one under the other: the rows of one have nothing in the columns of the others.
        forms = [form]
        while set(forms[-1].columns) <= values.keys():
            values = {name: value for name, value in values.items() if name not in forms[-1].columns}
            forms.append(find_form(values, self._alpaca, None, None))
        others = tuple(forms[1:-1])
        if not others or None not in column_values(table, form.first):
            return form
        return replace(form, has_messages=True, others=others)

    def style(self, form: Form) -> str:
        """Return how rows of this form are rendered: see `template`."""
        if form.has_messages:
            refuse_unused("with chats", {"template": self.template in TEMPLATES})
            return "chat"
        plain = "alpaca" if form.kind == "alpaca" else "plain"
        style = self.template or ("chat" if getattr(self.tokenizer, "chat_template", None) else plain)
        if style != "chat":
            given = {"chat_template": self.chat_template is not None, "learn": self.learn != "answers"}
            refuse_unused(f"with the form {style!r}", given)
        return style

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The prompt or the chat, with the optional columns."""
        form = self.form_of(table)
        needed = [form.first] if not form.others else [part.first for part in (form, *form.others)]
        return text_key(table, [*needed, *self._optional_columns_of(table, form)])

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs an answer; the messages of chats need a role and a content."""
        form = self.form_of(rows.table)
        if self.style(form) != "chat":
            require_text(rows, [form.first])
            if split != "predict":
                require_text(rows, [form.second])
            return rows
        if not form.has_messages:
            require_text(rows, [form.first])
        needs_answer = not self.generates(split)
        if needs_answer and form.second is not None and not form.has_messages:
            require_text(rows, [form.second])
        chats = self._chats(rows, form, needs_answer)
        for index, messages in chats.items():
            if problem := chat_problem(messages, needs_answer, self.learn):
                where = "" if form.others else f", column {form.first!r}"
                raise LitPeftError(f"{rows.locate(index)}{where}: {problem}.")
        if not needs_answer or self.train_on_inputs:
            return rows
        kept = [index for index, messages in chats.items() if learned_turns(messages, self.learn)]
        if not kept:
            raise LitPeftError(f"{rows.field} {rows.source!r}: no chat has a turn to learn; set a weight to 1.")
        if len(kept) < len(rows):
            self.notes.add(
                f"{rows.field}: {share_of(len(rows) - len(kept), len(rows), 'chats')} skipped, because the weight of "
                "all their answers is 0."
            )
        return replace(rows, indices=kept)

    def _chats(self, rows: Rows, form: Form, needs_answer: bool) -> dict[int, Any]:
        """Return the messages of each row by its index.

        Raises:
            LitPeftError: names the first row that cannot be read.
        """
        names = [name for name in form.all_columns if name in rows.table.column_names]
        batch = {name: column_values(rows.table, name) for name in names}
        filled = filled_columns(rows.table)
        found = {}
        for index in rows.indices:
            try:
                found[index] = read_row(batch, index, form, filled, needs_answer)
            except ValueError as problem:
                raise LitPeftError(f"{rows.locate(index)}: {problem}.") from problem
        return found

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels, at most `max_length` per example."""
        form = self.form_of(rows.table)
        style = self.style(form)
        if style == "chat":
            if not getattr(self.tokenizer, "chat_template", None):
                raise LitPeftError(
                    f"{rows.field} {rows.source!r} has {form.describe()}, but the tokenizer of {self.base!r} has no "
                    "chat template; set data.chat_template, or use the instruct version of the base model."
                )
            names = [name for name in TEMPLATE_COLUMNS if name in rows.table.column_names]
            self._note_template(rows, split, form, names)
            return self.encode_supervised(
                rows,
                split,
                encode_chats,
                form=form,
                template_columns=names,
                filled_columns=filled_columns(rows.table),
                learn=self.learn,
            )
        return self.encode_supervised(
            rows,
            split,
            encode_instructions,
            instruction_column=form.first,
            input_column=form.input,
            output_column=form.second,
            template=style,
            system_column=self.system_column,
            history_column=self.history_column,
        )

    def _optional_columns(self, form: Form) -> tuple[str, ...]:
        columns = form.all_columns if form.others else form.optional
        return (*columns, *TEMPLATE_COLUMNS) if self.style(form) == "chat" else columns

    def _optional_columns_of(self, table: Dataset, form: Form) -> list[str]:
        return [column for column in self._optional_columns(form) if column in table.column_names]

    def _note_template(self, rows: Rows, split: Split, form: Form, columns: list[str]) -> None:
        """Note what the chat template does not read and, once, whether the model learns to stop."""
        renderer, table = ChatRenderer(self.tokenizer), rows.to_table()
        used = [column for column in columns if column != TEMPLATE_COLUMNS[-1] and any(column_values(table, column))]
        used = ["tools" if column == "functions" else column for column in used]
        fields = template_fields(self._chats(rows, form, not self.generates(split)).values())
        unused = unused_fields(self.tokenizer, dict.fromkeys([*used, *fields]))
        if unused:
            self.notes.add(f"{rows.field}: the chat template does not read {', '.join(map(repr, unused))}.")
        if not self.generates(split) and not self._checked_end:
            self._checked_end = True
            self._note_end_of_turn(renderer.end_of_turn())

    def _note_end_of_turn(self, end: str | None) -> None:
        """Note whether the model learns to stop.

        Args:
            end: what the template puts after the assistant's text; None if it is unknown.
        """
        if end is None:
            return
        if not end:
            self.notes.add(
                "The chat template does not end the assistant's turn, so the model does not learn to stop: set "
                "data.chat_template to one that ends a turn with an end token.",
                warn=True,
            )
            return
        tokens = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        if not stop_tokens(self.tokenizer, self.base, self.revision).intersection(tokens):
            self.notes.add(
                f"The chat template ends the assistant's turn with {end!r}, at which generation does not stop: add its "
                "token to eos_token_id in the base model's generation_config.json."
            )


def filled_columns(table: Dataset) -> list[str]:
    """Return the columns whose objects were given the members of all rows, filled with nulls."""
    import datasets

    plain = (datasets.Json, datasets.Value)
    return [name for name, feature in table.features.items() if not isinstance(feature, plain)]


def encode_instructions(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    instruction_column: str,
    input_column: str | None,
    output_column: str | None,
    template: str,
    system_column: str,
    history_column: str,
    prompts_only: bool,
    **settings: Any,
) -> dict[str, list[Any]]:
    """Fill the template, and tokenize prompts and answers; see `encode_answers`.

    Raises:
        RowError: a row's history is not a list of pairs, or the template has no place for it.
    """
    instructions = [str(text) for text in batch[instruction_column]]
    texts = []
    for row, instruction in enumerate(instructions):
        # Optional columns; the number 0 is not an empty cell.
        cells = [batch[name][row] if name in batch else None for name in (input_column, system_column, history_column)]
        input_text, system = ("" if cell is None else str(cell) for cell in cells[:2])
        try:
            history = parse_history(cells[2])
        except ValueError as problem:
            message = f"column {history_column!r} has {brief(cells[2])}: {problem}; correct it."
            raise RowError(row, message) from problem
        if template == "llm_adapters" and (system or history):
            column = system_column if system else history_column
            raise RowError(row, f"data.template {template!r} has no place for column {column!r}; use 'alpaca'.")
        texts.append(fill_template(instruction, input_text, template, system, history))
    # Some files start answers with a line break or a space, but the template ends with its own.
    answers = None
    if not prompts_only:
        answers = [str(text) if template == "plain" else str(text).lstrip() for text in batch[output_column or ""]]
    return encode_answers(texts, answers, tokenizer=tokenizer, prompts_only=prompts_only, **settings)
