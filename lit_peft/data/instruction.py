"""Instructions with their answers: Alpaca's form, and chats."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.data.chats import (
    TEMPLATE_COLUMNS,
    ChatRenderer,
    chat_problem,
    encode_chats,
    has_learned_turn,
    template_fields,
)
from lit_peft.data.files import column_values
from lit_peft.data.notes import share_of
from lit_peft.data.prompt_templates import TEMPLATES, fill_template, parse_history
from lit_peft.data.rows import RowError, Rows, Split, require_text, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.data.supervised import SupervisedData, encode_answers
from lit_peft.models.tokenization import stop_tokens
from lit_peft.util.errors import LitPeftError, closest, first_line
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset


class InstructionData(SupervisedData):
    """Instructions in Alpaca's form, or chats, with the loss on the answers only.

    Alpaca: a row has an instruction, an output and optionally an input, a system prompt (it replaces the first
    sentences of Alpaca's prompt) and a history: earlier [instruction, answer] pairs, which are not learned.

    Chat: a row has messages, a list of `{role, content}`, which the tokenizer's chat template renders; content may be a
    list of text parts. The loss is on the assistant's turns, including their end-of-turn tokens, except for messages
    with `weight: 0` or `train: false`. A row's system prompt becomes the first message, and the columns `tools`,
    `documents` and `chat_template_kwargs`, if the file has them, are given to the template.

    Batches: `input_ids`, `attention_mask`, `labels`, all [batch, length]; labels are -100 where there is no loss.
    Prediction reads prompts, padded on the left; of a chat, everything before the assistant's last turn.

    Args:
        instruction_column: column of the instruction.
        input_column: column of the input; optional in rows and in files.
        output_column: column of the answer.
        template: `alpaca`, or `llm_adapters` (see `fill_template`).
        messages_column: column of the messages; set it (usually to `messages`) for chats.
        chat_template: the chat template, or a file with it, for tokenizers without one.
        system_column: column of the system prompt; optional in rows and in files.
        history_column: column of the earlier instructions and answers; optional in rows and in files.
        **common: see `SupervisedData` and `LitDataModule`.
    """

    def __init__(
        self,
        instruction_column: str = "instruction",
        input_column: str = "input",
        output_column: str = "output",
        template: str = "alpaca",
        messages_column: str | None = None,
        chat_template: str | None = None,
        system_column: str = "system",
        history_column: str = "history",
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
        self._checked_end = False
        alpaca_columns = (input_column, system_column, history_column)
        self.optional_columns = alpaca_columns if messages_column is None else (system_column, *TEMPLATE_COLUMNS)
        if messages_column is None:
            refuse_unused("without data.messages_column", {"chat_template": chat_template is not None})
        else:
            instructions = {
                "instruction_column": instruction_column != "instruction",
                "input_column": input_column != "input",
                "output_column": output_column != "output",
                "template": template != "alpaca",
                "history_column": history_column != "history",
            }
            refuse_unused("with data.messages_column", instructions)
        if template not in TEMPLATES:
            raise LitPeftError(f"data.template {template!r} is not known: use {closest(template, TEMPLATES)}.")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with `chat_template` if that is set."""
        tokenizer = super().tokenizer
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template)
        return tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        SupervisedData.tokenizer.fset(self, tokenizer)  # type: ignore[attr-defined]

    def columns(self, split: Split) -> dict[str, str | None]:
        """The messages; or the instruction and, except for prediction, the output."""
        if self.messages_column is not None:
            return {"data.messages_column": self.messages_column}
        needed: dict[str, str | None] = {"data.instruction_column": self.instruction_column}
        if split != "predict":
            needed["data.output_column"] = self.output_column
        return needed

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`.

        Raises:
            LitPeftError: the table has chats, and `messages_column` is not set.
        """
        if self.messages_column is None and self.instruction_column not in table.column_names and len(table):
            chat = next((name for name, value in table[0].items() if not chat_problem(value, needs_answer=False)), None)
            if chat is not None:
                raise LitPeftError(
                    f"{field} {source!r} has no column {self.instruction_column!r} (data.instruction_column), but it "
                    f"has chats in column {chat!r}: set data.messages_column to {chat!r}."
                )
        return super().prepare_table(table, split, field, source)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The instruction or the chat, with the optional columns."""
        column = self.messages_column or self.instruction_column
        return text_key(table, [column, *self._optional_columns_of(table)])

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs an answer; the messages of chats need a role and a content."""
        if self.messages_column is None:
            require_text(rows, [self.instruction_column])
            if split != "predict":
                require_text(rows, [self.output_column])
            return rows
        chats = column_values(rows.table, self.messages_column)
        for index in rows.indices:
            problem = chat_problem(chats[index], needs_answer=not self.generates(split))
            if problem:
                raise LitPeftError(f"{rows.locate(index)}, column {self.messages_column!r}: {problem}.")
        if self.generates(split) or self.train_on_inputs:
            return rows
        kept = [index for index in rows.indices if has_learned_turn(chats[index])]
        if not kept:
            raise LitPeftError(f"{rows.field} {rows.source!r}: no chat has a turn to learn; set a weight to 1.")
        if len(kept) < len(rows):
            self.notes.add(
                f"{rows.field}: {share_of(len(rows) - len(kept), len(rows), 'chats')} skipped, because the weight of "
                "all their answers is 0."
            )
        return replace(rows, indices=kept)

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels, at most `max_length` per example."""
        import datasets

        if self.messages_column is not None:
            if not getattr(self.tokenizer, "chat_template", None):
                raise LitPeftError(
                    f"data.messages_column is {self.messages_column!r}, but the tokenizer of {self.base!r} has no chat "
                    "template; set data.chat_template, or use the instruct version of the base model."
                )
            columns = self._optional_columns_of(rows.table)
            system_column = self.system_column if self.system_column in columns else None
            columns = [column for column in columns if column != system_column]
            self._note_template(rows, split, columns)
            features = rows.table.features
            return self.encode_supervised(
                rows,
                split,
                encode_chats,
                messages_column=self.messages_column,
                template_columns=columns,
                system_column=system_column,
                filled_columns=[
                    name
                    for name in (self.messages_column, *columns)
                    if not isinstance(features[name], (datasets.Json, datasets.Value))
                ],
            )
        return self.encode_supervised(
            rows,
            split,
            encode_instructions,
            instruction_column=self.instruction_column,
            input_column=self.input_column,
            output_column=self.output_column,
            template=self.template,
            system_column=self.system_column,
            history_column=self.history_column,
        )

    def _optional_columns_of(self, table: Dataset) -> list[str]:
        return [column for column in self.optional_columns if column in table.column_names]

    def _note_template(self, rows: Rows, split: Split, columns: list[str]) -> None:
        """Note what the chat template does not read and, once, whether the model learns to stop."""
        renderer, table = ChatRenderer(self.tokenizer), rows.to_table()
        used = [column for column in columns if column != TEMPLATE_COLUMNS[-1] and any(column_values(table, column))]
        fields = template_fields(column_values(table, str(self.messages_column)))
        unused = renderer.unused_fields([*used, *fields])
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


def read_template(value: str) -> str:
    """Return a chat template, given as itself or as the path of its file.

    Raises:
        LitPeftError: it is neither, or the file cannot be read.
    """
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text("utf-8")
    except (OSError, ValueError) as problem:
        raise LitPeftError(
            f"data.chat_template {value!r} is neither a template nor a readable file ({first_line(problem)}); give "
            "one of them."
        ) from problem


def encode_instructions(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    instruction_column: str,
    input_column: str,
    output_column: str,
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
        if template != "alpaca" and (system or history):
            column = system_column if system else history_column
            raise RowError(row, f"data.template {template!r} has no place for column {column!r}; use 'alpaca'.")
        texts.append(fill_template(instruction, input_text, template, system, history))
    # Some files start answers with a line break or a space, but the template ends with its own.
    answers = None if prompts_only else [str(text).lstrip() for text in batch[output_column]]
    return encode_answers(texts, answers, tokenizer=tokenizer, prompts_only=prompts_only, **settings)
