"""Pairs of texts of which one is better, for reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import pad_collator
from lit_peft.data.chat_rendering import ChatRenderer
from lit_peft.data.chats import first_problem
from lit_peft.data.collate import PadCollator
from lit_peft.data.comparisons import ComparisonData, first_values
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values
from lit_peft.data.instruction import filled_columns
from lit_peft.data.labels import parse_number
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import drop_cut_column, share_of
from lit_peft.data.preference_encoding import answer_text, prompt_text, rows_of, without_input
from lit_peft.data.preference_forms import (
    Columns,
    PreferenceForm,
    find_form,
    is_dialogue,
    read_preference,
    write_dialogue,
)
from lit_peft.data.rows import RowError, Rows, Split
from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

_STYLES = {
    "chat": "rendered by the tokenizer's chat template",
    "dialogue": "chats written as 'Human: …' and 'Assistant: …', because the tokenizer has no chat template",
}


class RewardData(ComparisonData):
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
    rows_per_example = 2

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
        names = Columns(prompt_column, chosen_column, rejected_column, None, None, "input", system_column, "history")
        super().__init__(names, chat_template, **common)
        self.margin_column = margin_column
        self.text_column = text_column
        self.optional_columns = (*self.optional_columns, margin_column, text_column)

    def columns(self, split: Split) -> dict[str, str | None]:
        """As `PreferenceData.columns`; for prediction of single texts, the column of those."""
        form = self.forms.get(split)
        if form is None or len(form.answers) == 2:
            return super().columns(split)
        return dict(zip(("data.text_column", "the answer of data.text_column"), form.columns, strict=False))

    def form_of(self, table: Dataset) -> PreferenceForm:
        """Return how the rows of a table write pairs, or the single texts to score."""
        names, values = set(table.column_names), first_values(table)
        form = find_form(values, self.named)
        if {self.named.chosen, self.named.rejected} & names:
            is_missing = form.prompt is not None and self.named.prompt is None and form.prompt.first not in names
            return replace(form, prompt=None) if is_missing else form
        if self.text_column not in names:
            # A single answer is read like one with a label.
            form = replace(find_form({**values, "label": None}, self.named), label=None)
            if set(form.columns) <= names:
                return form
        kind = "dialogue" if is_dialogue(values.get(self.text_column)) else "text"
        return PreferenceForm(None, (self.text_column,), None, kind)

    def style(self, form: PreferenceForm) -> str:
        """Return how prompts become text: `chat`, by the chat template; `dialogue`; `alpaca`; or `plain`."""
        if getattr(self.tokenizer, "chat_template", None):
            return "chat"
        return "dialogue" if form.kind != "text" else "alpaca" if form.is_alpaca else "plain"

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; it also finds the form of the rows, and notes it."""
        form = self.form_of(table)
        if split != "predict" and len(form.answers) != 2:
            form = PreferenceForm(None, (self.named.chosen, self.named.rejected), None, "text")
        self.forms[split] = form
        self.optional_columns = (self.margin_column, *form.optional)
        if len(form.answers) == 2 and set(form.columns) <= set(table.column_names):
            prompt = "no prompt column" if form.prompt is None else f"prompts in column {form.prompt.first!r}"
            margin = f", margins in {self.margin_column!r}" if self.margin_column in table.column_names else ""
            is_text = form.prompt is None and form.kind == "text"
            how = "read as text" if is_text else _STYLES.get(self.style(form), "joined as text")
            self.notes.add(f"{field}: pairs with {prompt}{margin}, {how}.")
            self.note_unread(form, table, field)
        return super().prepare_table(table, split, field, source)

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens of both texts, or of the single one, cut to `max_length`, and the margin."""
        form = self.form_of(rows.table)
        has_margin = self.margin_column in rows.table.column_names and split != "predict"
        if self.style(form) != "chat" and self.tokenizer.pad_token_id == self.tokenizer.eos_token_id is not None:
            self.notes.add(
                "The tokenizer pads with its end-of-text token, which the head of a decoder passes over: a score is "
                "read at the token before it.",
                once=True,
            )
        table = tokenize(
            rows,
            encode_texts_to_score,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            form=form,
            style=self.style(form),
            filled_columns=filled_columns(rows.table),
            margin_column=self.margin_column if has_margin else None,
            max_length=self.max_length,
        )
        is_paired = len(form.answers) == 2
        table = drop_cut_column(table, self.notes, split, "pairs" if is_paired else "texts", self.max_length)
        if not is_paired or split == "predict":
            return table
        kept = [index for index, (one, other) in enumerate(column_values(table, "input_ids")) if one != other]
        if not kept and not self.streaming:
            raise LitPeftError(
                f"data.max_length is {self.max_length}, and no pair of data.{split} differs within it; give pairs that "
                "differ, raise it, or set data.truncation_side to 'left'."
            )
        if len(kept) == len(table):
            return table
        self.notes.add(
            f"data.{split}: {share_of(len(table) - len(kept), len(table), 'pairs')} skipped, because their texts are "
            f"equal within data.max_length {self.max_length}.",
            warn=True,
        )
        return table.select(kept)

    def to_show(self, example: dict[str, Any]) -> dict[str, Any]:
        """As `LitDataModule.to_show`; of a pair, the first text is the right one."""
        return {**example, "labels": 0} if isinstance(example["input_ids"][0], (list, tuple)) else example

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
            batch["margin"] = torch.tensor([example["margin"] for example in examples], dtype=torch.float32)
        if self.paired:
            batch["paired"] = [True] * len(examples)
        return batch


def encode_texts_to_score(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    form: PreferenceForm,
    style: str,
    filled_columns: Sequence[str],
    margin_column: str | None,
    max_length: int,
) -> dict[str, list[Any]]:
    """Tokenize both texts of each pair, or single ones; `cut` is the number of tokens that were cut.

    Args:
        batch: the columns of the rows.
        tokenizer: the tokenizer.
        form: how the rows are written.
        style: see `RewardData.style`.
        filled_columns: the columns whose objects were given the members of all rows, filled with nulls.
        margin_column: the column of the margin, if it is read.
        max_length: maximum number of tokens of a text.

    Raises:
        RowError: a row cannot be read or rendered, or its margin is not a number.
    """
    renderer = ChatRenderer(tokenizer) if style == "chat" else None
    form, input_column = without_input(form, style)
    out: dict[str, list[Any]] = {name: [] for name in ("input_ids", "cut", *(["margin"] if margin_column else []))}
    for row, cells in enumerate(rows_of(batch, filled_columns)):
        try:
            prompt, answers = read_preference(cells, form)
            if problem := next(filter(None, (first_problem([*prompt, *answer]) for answer in answers)), ""):
                raise ValueError(problem)
            # There is no telling who says a text without a prompt.
            chat = renderer if prompt or form.kind != "text" else None
            texts = [
                _chat_text(chat, [*prompt, *answer])
                if chat is not None
                else _plain_text(prompt, answer, style, cells.get(input_column or ""))
                for answer in answers
            ]
        except ValueError as error:
            raise RowError(row, f"{error}; correct it.") from error
        found = [_tokens(tokenizer, text, max_length, special=chat is None) for text in texts]
        out["input_ids"].append([ids for ids, _ in found] if len(found) == 2 else found[0][0])
        out["cut"].append(sum(cut for _, cut in found))
        if margin_column is not None:
            margin = parse_number(cells[margin_column])
            if margin is None:
                raise RowError(
                    row,
                    f"column {margin_column!r} has {brief(cells[margin_column])}, which is not a number; correct it, "
                    "or give data.margin_column another name to read no margins.",
                )
            out["margin"].append(margin)
    return out


def _chat_text(renderer: ChatRenderer, messages: list[Any]) -> str:
    try:
        return renderer.render(renderer.clean(messages))
    except Exception as problem:  # whatever a template raises
        raise ValueError(f"the messages cannot be rendered ({first_line(problem)})") from problem


def _plain_text(prompt: list[Any], answer: list[Any], style: str, input_cell: Any) -> str:
    if style == "dialogue":
        return write_dialogue([*prompt, *answer])
    before, after = prompt_text(prompt, style, input_cell) if prompt else "", answer_text(answer)
    # An empty line is between them, unless there is white space.
    return f"{before}{'' if not before or before[-1].isspace() or after[:1].isspace() else chr(10) * 2}{after}"


def _tokens(tokenizer: Any, text: str, max_length: int, special: bool) -> tuple[list[int], int]:
    """Return the ids of a text, cut, and how many were cut; `special`: with the tokens that open and end a text."""
    end = tokenizer.eos_token_id
    whole = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    adds_end = special and end is not None and (not whole or whole[-1] != end)
    over = max(0, len(whole) + adds_end - max_length)
    if over:
        settings = {"truncation": True, "max_length": max_length - adds_end, "add_special_tokens": special}
        whole = list(tokenizer(text, **settings)["input_ids"])
    return ([*whole, end] if adds_end else whole), over
