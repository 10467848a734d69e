"""Pairs of texts of which one is better, for reward models."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.chat_rendering import ChatRenderer
from lit_peft.data.collate import PadCollator
from lit_peft.data.conversations import Form, find_form, read_conversation
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values
from lit_peft.data.labels import parse_number
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import drop_cut_column, share_of
from lit_peft.data.pairs import (
    Message,
    PairForm,
    find_pair_form,
    join_text,
    read_dialogue,
    read_pair,
    write_dialogue,
)
from lit_peft.data.prompt_templates import read_template
from lit_peft.data.rows import RowError, Rows, Split, normalize_text
from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

# A table's form is found from the first value of each column; this many rows are searched for one.
_ROWS_TO_SEARCH = 100


class RewardData(LitDataModule):
    """A prompt with a chosen and a rejected answer, for a reward model, which scores both.

    The answers are text or messages, and may contain the prompt; the prompt is text, messages, an instruction with an
    input (as LLaMA-Factory writes them), or ShareGPT's conversations. Dialogues as in Anthropic's hh-rlhf are read as
    messages. Messages are rendered by the tokenizer's chat template, and so are prompts with their answers if there is
    one; without a chat template, messages are written as in hh-rlhf, and a prompt and its answer are joined. A text
    that no template has ended gets the end-of-text token, if the tokenizer has one.

    Batches: `input_ids`, `attention_mask` [2 * pairs, length], the chosen texts first, and `margin` [pairs] if the file
    has that column. Prediction reads pairs, or single texts: the column `text`, a prompt and its answer, or a chat.

    Args:
        prompt_column: column of the prompt; unset: it is found, and need not be there.
        chosen_column: column of the better answer.
        rejected_column: column of the other one.
        margin_column: column of the margin, by which the rewards are to differ at least; read if the file has it.
        text_column: column of single texts to score in prediction.
        system_column: column of the system prompt; optional in rows and in files.
        chat_template: the chat template, or a file with it (also `pkg:DISTRIBUTION/path`), instead of the tokenizer's.
        **common: see `LitDataModule`.
    """

    task = "reward"

    def __init__(
        self,
        prompt_column: str | None = None,
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        margin_column: str = "margin",
        text_column: str = "text",
        system_column: str = "system",
        chat_template: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.prompt_column = prompt_column
        self.chosen_column = chosen_column
        self.rejected_column = rejected_column
        self.margin_column = margin_column
        self.text_column = text_column
        self.system_column = system_column
        self.chat_template = chat_template
        self._pairs = PairForm(chosen_column, rejected_column, prompt_column, None, system_column)
        # The columns of a table to predict that has single texts; None: it has pairs, or has not been read yet.
        self._single: tuple[str, ...] | None = (text_column,)
        self.optional_columns = (margin_column, *self._pairs.optional)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with `chat_template` if that is set."""
        tokenizer = super().tokenizer
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template)
        return tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        LitDataModule.tokenizer.fset(self, tokenizer)  # type: ignore[attr-defined]

    def columns(self, split: Split) -> dict[str, str | None]:
        """The two answers, and the prompt if a setting names its column; for prediction of single texts, those."""
        if split == "predict" and self._single is not None:
            return dict(zip(("data.text_column", "the answer of data.text_column"), self._single, strict=False))
        answers = {"data.chosen_column": self.chosen_column, "data.rejected_column": self.rejected_column}
        return {**answers, "data.prompt_column": self.prompt_column}

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; it also finds the form of the rows, and notes it."""
        form = self._form_of(table)
        self._single = self._single_columns(table) if split == "predict" else self._single
        self.optional_columns = (self.margin_column, *form.optional)
        if self._has_pairs(table):
            prompt = "no prompt column" if form.prompt is None else f"prompts in column {form.prompt!r}"
            margin = f", margins in {self.margin_column!r}" if self.margin_column in table.column_names else ""
            self.notes.add(f"{field}: pairs with {prompt}{margin}, {self._rendered(table, form)}.")
        return super().prepare_table(table, split, field, source)

    def _rendered(self, table: Dataset, form: PairForm) -> str:
        """Return in words how the rows of a table become text."""
        if self._is_chat(table, form):
            if self._has_template:
                return "rendered by the tokenizer's chat template"
            return "chats written as 'Human: …' and 'Assistant: …', because the tokenizer has no chat template"
        if form.prompt is None:
            return "read as text"
        return "rendered by the tokenizer's chat template" if self._has_template else "joined as text"

    def _is_chat(self, table: Dataset, form: PairForm) -> bool:
        try:
            return len(table) > 0 and not isinstance(read_pair(table[0], form).chosen, str)
        except ValueError:  # `check_rows` says what is wrong
            return False

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _has_pairs(self, table: Dataset) -> bool:
        return {self.chosen_column, self.rejected_column} <= set(table.column_names)

    def _form_of(self, table: Dataset) -> PairForm:
        return find_pair_form(table.column_names, self._pairs)

    def _single_columns(self, table: Dataset) -> tuple[str, ...] | None:
        """Return the columns of the single texts of a table; None if it has pairs."""
        if self._has_pairs(table):
            return None
        return (self.text_column,) if self.text_column in table.column_names else self._chat_form(table).columns

    def _chat_form(self, table: Dataset) -> Form:
        """Return how the rows of a table without pairs write a prompt and its answer, or a chat."""
        values = {}
        for name in table.column_names:
            first = (table[index][name] for index in range(min(len(table), _ROWS_TO_SEARCH)))
            values[name] = next((value for value in first if value is not None), None)
        alpaca = Form("alpaca", "instruction", "output", "input", self.system_column, "history")
        form = find_form(values, alpaca, None, None)
        return form if set(form.columns) <= values.keys() else Form("messages", self.text_column)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The prompt with both answers."""
        return self._key(table, whole=True)

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The prompt, which may have several pairs of answers; without one, both answers."""
        return self._key(table, whole=False)

    def _key(self, table: Dataset, whole: bool) -> Callable[[int], Hashable]:
        form = self._form_of(table)
        cells = _Cells(table, (*self.columns("train").values(), *form.optional))

        def key(index: int) -> Hashable:
            try:
                pair = read_pair(cells[index], form, as_chat=True)
            except ValueError:  # `check_rows` says what is wrong
                return index
            parts = (pair.prompt, pair.chosen, pair.rejected) if whole or not pair.prompt else (pair.prompt,)
            return tuple(normalize_text(str(part)) for part in parts)

        return key

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs both answers, which differ, and a margin that is a number if there is that column."""
        if split == "predict" and not self._has_pairs(rows.table):
            return rows
        form = self._form_of(rows.table)
        cells = _Cells(rows.table, (*self.columns("train").values(), *form.optional, self.margin_column))
        has_margin = self.margin_column in rows.table.column_names
        kept = []
        for index in rows.indices:
            row = cells[index]
            try:
                pair = read_pair(row, form)
            except ValueError as problem:
                raise LitPeftError(f"{rows.locate(index)}: {problem}; correct it.") from problem
            if has_margin and split != "predict" and parse_number(row[self.margin_column]) is None:
                raise LitPeftError(
                    f"{rows.locate(index)}: column {self.margin_column!r} has {brief(row[self.margin_column])}, which "
                    "is not a number; correct it, or give data.margin_column another name to read no margins."
                )
            if pair.chosen != pair.rejected or split == "predict":
                kept.append(index)
        if not kept:
            raise LitPeftError(
                f"{rows.field} {rows.source!r}: the chosen and the rejected answer are equal in all rows."
            )
        if len(kept) == len(rows):
            return rows
        self.notes.add(
            f"{rows.field}: {share_of(len(rows) - len(kept), len(rows), 'pairs')} skipped, because their answers are "
            "equal."
        )
        return replace(rows, indices=kept)

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens of both texts, or of the single one, cut to `max_length`, and the margin."""
        pairs = self._has_pairs(rows.table)
        form = self._form_of(rows.table)
        has_margin = self.margin_column in rows.table.column_names and split != "predict"
        settings: dict[str, Any] = {"text_column": self.text_column, "form": self._chat_form(rows.table)}
        if pairs:
            settings = {"form": form, "margin_column": self.margin_column if has_margin else None}
        settings["max_length"] = self.max_length
        function = encode_pairs if pairs else encode_single
        table = tokenize(rows, function, self.tokenizer, f"Tokenizing {split}", self.num_proc, **settings)
        table = drop_cut_column(table, self.notes, split, "pairs" if pairs else "texts", self.max_length)
        if not pairs or split == "predict":
            return table
        equal = [index for index, (one, other) in enumerate(column_values(table, "input_ids")) if one == other]
        if not equal:
            return table
        if len(equal) == len(table) and not self.streaming:
            raise LitPeftError(
                f"data.max_length is {self.max_length}, and no pair of data.{split} differs within it; raise it, or "
                "set data.truncation_side to 'left'."
            )
        self.notes.add(
            f"data.{split}: {share_of(len(equal), len(table), 'pairs')} dropped, because their texts are equal within "
            f"data.max_length {self.max_length}.",
            warn=True,
        )
        dropped = set(equal)
        return table.select([index for index in range(len(table)) if index not in dropped])

    def collator(self, split: Split) -> Collate:
        """As `LitDataModule.collator`, for both texts of each pair."""
        return RewardCollator(pad_collator(self), paired=split == "predict")


@dataclass(frozen=True)
class RewardCollator:
    """Makes rows of the chosen texts and, after them, of the rejected ones; single texts stay as they are.

    Attributes:
        pad: pads the rows.
        paired: tell pairs from single texts by an entry `paired`, as prediction needs it.
    """

    pad: PadCollator
    paired: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        if not isinstance(examples[0]["input_ids"][0], (list, tuple)):
            return self.pad(examples)
        rows = [{"input_ids": example["input_ids"][side]} for side in (0, 1) for example in examples]
        batch: dict[str, Any] = dict(self.pad(rows))
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([example["margin"] for example in examples])
        if self.paired:
            batch["paired"] = [True] * len(examples)
        return batch


class _Cells:
    """The rows of a table as dictionaries of some of its columns."""

    def __init__(self, table: Dataset, columns: Any) -> None:
        names = [name for name in dict.fromkeys(columns) if name in table.column_names]
        self.values = {name: column_values(table, name) for name in names}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.values.items()}


def encode_pairs(
    batch: dict[str, list[Any]], *, tokenizer: Any, form: PairForm, margin_column: str | None, max_length: int
) -> dict[str, list[Any]]:
    """Tokenize both texts of each pair; `cut` is the number of tokens that were cut from both.

    Raises:
        RowError: a row's messages cannot be rendered.
    """
    encoder = _Encoder(tokenizer, max_length)
    out: dict[str, list[Any]] = {"input_ids": [], "cut": []}
    for row in range(len(batch[form.chosen])):
        cells = {name: values[row] for name, values in batch.items()}
        pair = read_pair(cells, form, as_chat=encoder.renderer is not None)
        found = [encoder(row, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        out["input_ids"].append([ids for ids, _ in found])
        out["cut"].append(sum(cut for _, cut in found))
    if margin_column is not None:
        out["margin"] = [parse_number(value) for value in batch[margin_column]]
    return out


def encode_single(
    batch: dict[str, list[Any]], *, tokenizer: Any, text_column: str, form: Form, max_length: int
) -> dict[str, list[Any]]:
    """Tokenize the single texts, chats, or prompts and answers to score; `cut` counts the tokens that were cut.

    Raises:
        RowError: a row has no text, or its messages cannot be read or rendered.
    """
    encoder = _Encoder(tokenizer, max_length)
    out: dict[str, list[Any]] = {"input_ids": [], "cut": []}
    for row in range(len(next(iter(batch.values())))):
        cells = {name: values[row] for name, values in batch.items()}
        if text_column in cells:
            text = cells[text_column]
            dialogue = read_dialogue(text) if isinstance(text, str) else []
            if not dialogue and (text is None or not str(text).strip()):
                raise RowError(row, f"no text in column {text_column!r}; remove the row.")
            ids, cut = encoder(row, "", dialogue or str(text))
        else:
            try:
                messages = read_conversation(cells, form)
            except ValueError as problem:
                raise RowError(row, f"{problem}; correct it.") from problem
            messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
            if encoder.renderer is None and form.second is not None and not form.has_messages:
                ids, cut = encoder(row, *_prompt_and_answer(messages))
            else:
                ids, cut = encoder(row, [], messages)
        out["input_ids"].append(ids)
        out["cut"].append(cut)
    return out


def _prompt_and_answer(messages: list[Message]) -> tuple[str, str]:
    texts = [str(message["content"]) for message in messages]
    return "\n\n".join(texts[:-1]), texts[-1]


class _Encoder:
    """Renders and tokenizes a prompt with its answer.

    Args:
        tokenizer: the tokenizer.
        max_length: maximum number of tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        has_template = getattr(tokenizer, "chat_template", None)
        self.renderer = ChatRenderer(tokenizer) if has_template else None

    def __call__(self, row: int, prompt: list[Message] | str, answer: list[Message] | str) -> tuple[list[int], int]:
        """Return the token ids, and the number of tokens that were cut.

        Raises:
            RowError: the messages cannot be rendered.
        """
        if isinstance(answer, str):
            return self._tokens(join_text(str(prompt), answer))
        messages = [*prompt, *answer]
        try:
            if self.renderer is None:
                return self._tokens(write_dialogue(messages))
            text = self.renderer.render(self.renderer.clean(messages))
        except Exception as problem:  # whatever a template raises
            raise RowError(
                row, f"the messages cannot be rendered ({first_line(problem)}); correct the row."
            ) from problem
        return self._tokens(text, special=False)

    def _tokens(self, text: str, special: bool = True) -> tuple[list[int], int]:
        """Return the ids of a text; `special`: with the tokens that open and end a text."""
        end = self.tokenizer.eos_token_id
        whole = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        adds_end = special and end is not None and (not whole or whole[-1] != end)
        over = max(0, len(whole) + adds_end - self.max_length)
        if over:
            limit = self.max_length - adds_end
            settings = {"truncation": True, "max_length": limit, "add_special_tokens": special}
            whole = list(self.tokenizer(text, **settings)["input_ids"])
        return ([*whole, end] if adds_end else whole), over
