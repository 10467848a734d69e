"""Instructions with their answers: Alpaca's form, and chats."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import Rows, Split, refuse_unread
from lit_peft.data.collate import IGNORE
from lit_peft.data.files import column_values
from lit_peft.data.supervised import SupervisedData, join_answers
from lit_peft.util.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset

_OPENING = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."
# What stands between the lines of LLM-Adapters' prompts: the indentation of their source, and a comment of it.
_INDENT = " " * 16
_COMMENT = "  # noqa: E501"

TEMPLATES = ("alpaca", "llm_adapters")


def fill_template(instruction: str, given: str = "", template: str = "alpaca") -> str:
    """Return the prompt for an instruction, up to where the answer begins.

    Args:
        instruction: what to do.
        given: what to do it with; "" for none.
        template: `alpaca`, or `llm_adapters`: the same as `evaluate.py` of LLM-Adapters writes it, for adapters
            trained there, with the 16 spaces and the comment of its source in the prompt.
    """
    parts = [f"{_OPENING}{_INPUT if given else ''}{_REQUEST}", f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{given}"] if given else []
    parts += ["### Response:\n"]
    if template == "alpaca":
        return "\n\n".join(parts)
    parts = [part.replace(":\n", f":\n{_INDENT}", 1) for part in parts]
    return f"{parts[0]}{_COMMENT}\n\n{_INDENT}" + f"\n{_INDENT}\n{_INDENT}".join(parts[1:])


class InstructionData(SupervisedData):
    """Instructions in Alpaca's form, or chats, with the loss on the answers only.

    Alpaca: a row has an instruction, an output and optionally an input. Chat: a row has messages, a list of
    `{role, content}`, which the tokenizer's chat template brings into its form; the loss is on what the assistant says,
    its end-of-turn token included. Batches: `input_ids`, `attention_mask`, `labels`, all [batch, length]; labels are
    -100 where there is no loss. Prediction takes prompts, padded on the left; of a chat, all up to the last assistant's
    turn.

    Args:
        instruction_column: column of the instruction.
        input_column: column of the input; rows, and files, may be without.
        output_column: column of the answer.
        template: `alpaca`, or `llm_adapters` (see `fill_template`).
        messages_column: column of the messages; set it (usually to `messages`) for chats.
        chat_template: the chat template, or a file with it, for tokenizers that bring none.
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
            refuse_unread("without data.messages_column", {"chat_template": chat_template is not None})
        else:
            instructions = {
                "instruction_column": instruction_column != "instruction",
                "input_column": input_column != "input",
                "output_column": output_column != "output",
                "template": template != "alpaca",
            }
            refuse_unread("with data.messages_column", instructions)
        if template not in TEMPLATES:
            raise LitPeftError(f"data.template {template!r} is not known: use {closest(template, TEMPLATES)}.")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with `chat_template` where that is set."""
        tokenizer = super().tokenizer
        if self.chat_template is not None:
            file = "\n" not in self.chat_template and Path(self.chat_template).is_file()
            tokenizer.chat_template = Path(self.chat_template).read_text("utf-8") if file else self.chat_template
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

    def prepared(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepared`.

        Raises:
            LitPeftError: the table holds chats, and no setting says so.
        """
        if self.messages_column is None and self.instruction_column not in table.column_names and len(table):
            chat = next((name for name, value in table[0].items() if not _chat_problem(value, answered=False)), None)
            if chat is not None:
                raise LitPeftError(
                    f"{field} {source!r} has no column {self.instruction_column!r} (data.instruction_column), and "
                    f"chats in column {chat!r}: set data.messages_column to {chat!r}."
                )
        return super().prepared(table, split, field, source)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The instruction with its input, or the chat."""
        if self.messages_column is not None:
            return self.text_key(table, [self.messages_column])
        return self.text_key(table, [self.instruction_column, self._input_of(table)])

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs an answer; chats need messages with role and content."""
        if self.messages_column is None:
            self.require_text(rows, [self.instruction_column])
            if split != "predict":
                self.require_text(rows, [self.output_column])
            return rows
        chats = column_values(rows.table, self.messages_column)
        for row in rows.numbers:
            problem = _chat_problem(chats[row], answered=not self.generates(split))
            if problem:
                raise LitPeftError(f"{rows.where(row)}, column {self.messages_column!r}: {problem}.")
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels, at most `max_length` of them to an example."""
        if self.messages_column is not None:
            if not getattr(self.tokenizer, "chat_template", None):
                raise LitPeftError(
                    f"data.messages_column is {self.messages_column!r}, and the tokenizer of {self.base!r} "
                    "has no chat template; set data.chat_template, or take the base model's instruct version."
                )
            return self.supervised(rows, split, encode_chats, messages_column=self.messages_column)
        return self.supervised(
            rows,
            split,
            encode_instructions,
            instruction_column=self.instruction_column,
            input_column=self._input_of(rows.table),
            output_column=self.output_column,
            template=self.template,
        )

    def _input_of(self, table: Dataset) -> str | None:
        return self.input_column if self.input_column in table.column_names else None


def encode_instructions(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    instruction_column: str,
    input_column: str | None,
    output_column: str,
    template: str,
    prompts: bool,
    **settings: Any,
) -> dict[str, list[Any]]:
    """Fill the template, and tokenize prompts and answers; see `join_answers`."""
    instructions = [str(text) for text in batch[instruction_column]]
    inputs = (
        ["" if text is None else str(text) for text in batch[input_column]]
        if input_column
        else [""] * len(instructions)
    )
    texts = [fill_template(*pair, template) for pair in zip(instructions, inputs, strict=True)]
    # Their files open answers with a line break or a blank; the template's own stands already.
    answers = None if prompts else [str(text).lstrip() for text in batch[output_column]]
    return join_answers(texts, answers, tokenizer=tokenizer, prompts_only=prompts, **settings)


def encode_chats(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    messages_column: str,
    max_length: int,
    train_on_inputs: bool,
    prompts: bool,
) -> dict[str, list[Any]]:
    """Render chats by the template, and supervise the tokens of the assistant's turns.

    A turn begins where the template's generation prompt ends, and ends where the template ends it, less white space.

    Raises:
        LitPeftError: the template writes earlier turns otherwise once later ones follow.
    """
    out: dict[str, list[Any]] = {"input_ids": [], "length": []} | ({} if prompts else {"labels": []})
    for messages in batch[messages_column]:
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if prompts:
            while messages[-1]["role"] == "assistant":
                messages.pop()
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            out["input_ids"].append(ids[-max_length:])
            out["length"].append(len(ids))
            continue
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
            until = tokenizer.apply_chat_template(messages[: at + 1], tokenize=False).rstrip()
            if not until.startswith(before) or not text.startswith(until):
                raise LitPeftError(
                    "The tokenizer's chat template writes a turn otherwise when later ones follow it (such as without "
                    "its reasoning), so what the assistant says cannot be told from it; set data.chat_template to one "
                    f"that only appends. The turn: {message['content'][:80]!r}."
                )
            spans.append((len(before), len(until)))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        labels = [
            token if train_on_inputs or any(start < high and end > low for low, high in spans) else IGNORE
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        if all(label == IGNORE for label in labels[:max_length][1:]):
            continue
        out["input_ids"].append(ids[:max_length])
        out["labels"].append(labels[:max_length])
        out["length"].append(len(ids))
    return out


def _chat_problem(messages: Any, answered: bool) -> str:
    """Say what is wrong with a chat; "" if nothing is."""
    if not isinstance(messages, list) or not messages:
        return "no list of messages; each needs a role and a content"
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not message.get("role") or message.get("content") is None:
            return f"message {at + 1} lacks its role or content"
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant" and len(set(roles)) == 1:
        return "no turn but the assistant's; put a user's before it"
    if answered and "assistant" not in roles:
        return f"no assistant's turn to learn; the roles are {', '.join(map(repr, dict.fromkeys(roles)))}"
    return ""
