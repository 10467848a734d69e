"""Instructions with their answers: Alpaca's form, and chats."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.data.chats import chat_problem, encode_chats
from lit_peft.data.files import column_values
from lit_peft.data.prompt_templates import TEMPLATES, fill_template
from lit_peft.data.rows import Rows, Split, require_text, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.data.supervised import SupervisedData, encode_answers
from lit_peft.util.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset


class InstructionData(SupervisedData):
    """Instructions in Alpaca's form, or chats, with the loss on the answers only.

    Alpaca: a row has an instruction, an output and optionally an input. Chat: a row has messages, a list of
    `{role, content}`, which the tokenizer's chat template renders; the loss is on the assistant's turns, including
    their end-of-turn tokens. Batches: `input_ids`, `attention_mask`, `labels`, all [batch, length]; labels are -100
    where there is no loss. Prediction reads prompts, padded on the left; of a chat, everything before the assistant's
    last turn.

    Args:
        instruction_column: column of the instruction.
        input_column: column of the input; optional in rows and in files.
        output_column: column of the answer.
        template: `alpaca`, or `llm_adapters` (see `fill_template`).
        messages_column: column of the messages; set it (usually to `messages`) for chats.
        chat_template: the chat template, or a file with it, for tokenizers without one.
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
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.instruction_column = instruction_column
        self.input_column = input_column
        self.output_column = output_column
        self.template = template
        self.messages_column = messages_column
        self.chat_template = chat_template
        if messages_column is None:
            refuse_unused("without data.messages_column", {"chat_template": chat_template is not None})
        else:
            instructions = {
                "instruction_column": instruction_column != "instruction",
                "input_column": input_column != "input",
                "output_column": output_column != "output",
                "template": template != "alpaca",
            }
            refuse_unused("with data.messages_column", instructions)
        if template not in TEMPLATES:
            raise LitPeftError(f"data.template {template!r} is not known: use {closest(template, TEMPLATES)}.")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with `chat_template` if that is set."""
        tokenizer = super().tokenizer
        if self.chat_template is not None:
            is_path = "\n" not in self.chat_template and Path(self.chat_template).is_file()
            tokenizer.chat_template = Path(self.chat_template).read_text("utf-8") if is_path else self.chat_template
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
        """The instruction with its input, or the chat."""
        if self.messages_column is not None:
            return text_key(table, [self.messages_column])
        return text_key(table, [self.instruction_column, self._input_column_of(table)])

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
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels, at most `max_length` per example."""
        if self.messages_column is not None:
            if not getattr(self.tokenizer, "chat_template", None):
                raise LitPeftError(
                    f"data.messages_column is {self.messages_column!r}, but the tokenizer of {self.base!r} has no chat "
                    "template; set data.chat_template, or use the instruct version of the base model."
                )
            return self.encode_supervised(rows, split, encode_chats, messages_column=self.messages_column)
        return self.encode_supervised(
            rows,
            split,
            encode_instructions,
            instruction_column=self.instruction_column,
            input_column=self._input_column_of(rows.table),
            output_column=self.output_column,
            template=self.template,
        )

    def _input_column_of(self, table: Dataset) -> str | None:
        return self.input_column if self.input_column in table.column_names else None


def encode_instructions(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    instruction_column: str,
    input_column: str | None,
    output_column: str,
    template: str,
    prompts_only: bool,
    **settings: Any,
) -> dict[str, list[Any]]:
    """Fill the template, and tokenize prompts and answers; see `encode_answers`."""
    instructions = [str(text) for text in batch[instruction_column]]
    inputs = (
        ["" if text is None else str(text) for text in batch[input_column]]
        if input_column
        else [""] * len(instructions)
    )
    texts = [fill_template(*pair, template) for pair in zip(instructions, inputs, strict=True)]
    # Some files start answers with a line break or a space, but the template ends with its own.
    answers = None if prompts_only else [str(text).lstrip() for text in batch[output_column]]
    return encode_answers(texts, answers, tokenizer=tokenizer, prompts_only=prompts_only, **settings)
