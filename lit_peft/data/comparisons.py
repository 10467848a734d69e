"""What the data modules of preferences and of rewards share: they read the same forms of prompts with answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule
from lit_peft.data.chats import TEMPLATE_COLUMNS
from lit_peft.data.files import column_values
from lit_peft.data.preference_forms import (
    CHATS,
    COMPLETIONS,
    LABELS,
    PROMPTS,
    Columns,
    PreferenceForm,
    find_form,
    read_preference,
)
from lit_peft.data.rows import Split, first_values, text_key

if TYPE_CHECKING:
    from datasets import Dataset


class ComparisonData(LitDataModule):
    """Prompts with answers that are better or worse.

    Args:
        named: the columns that the settings name.
        chat_template: the chat template, or a file with it, instead of the tokenizer's.
        **common: see `LitDataModule`.
    """

    def __init__(self, named: Columns, chat_template: str | None, **common: Any) -> None:
        super().__init__(**common)
        self.named = named
        self.chat_template = chat_template
        # The form of each split's table.
        self.forms: dict[Split, PreferenceForm] = {}
        # Until a table is read, every column that a form may have.
        names = (*PROMPTS, *CHATS, *COMPLETIONS, *LABELS, *TEMPLATE_COLUMNS, *filter(None, vars(named).values()))
        self.optional_columns = names

    def columns(self, split: Split) -> dict[str, str | None]:
        """The columns of the prompt and of the answers or, for single answers, of the label."""
        form = self.forms.get(split)
        if form is None:
            return {}
        names: dict[str, str | None] = {}
        if form.prompt is not None:
            names["data.prompt_column"] = form.prompt.first
        settings = ("data.chosen_column", "data.rejected_column") if form.label is None else ("data.completion_column",)
        names.update(zip(settings, form.answers, strict=False))
        return names if form.label is None else {**names, "data.label_column": form.label}

    def form_of(self, table: Dataset) -> PreferenceForm:
        """Return how the rows of a table write preferences."""
        return find_form(first_values(table), self.named)

    def note_unread(self, form: PreferenceForm, table: Dataset, field: str) -> None:
        """Note that a column with the prompt is not read, because the answers contain it."""
        names = (self.named.prompt, *PROMPTS)
        unread = [name for name in names if name in table.column_names and name not in form.columns]
        if form.prompt is None and unread:
            self.notes.add(
                f"{field}: column {unread[0]!r} not used, because the answers contain their prompts.", warn=False
            )

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The prompt and the answers."""
        form = self.form_of(table)
        return text_key(table, [name for name in (*form.columns, *form.optional) if name in table.column_names])

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The prompt: all answers to a prompt are in one split; without a prompt, the answers."""
        form, whole = self.form_of(table), self.duplicate_key(table)
        columns = {name: column_values(table, name) for name in form.columns}
        if form.prompt is not None and form.answers:
            prompts = columns[form.prompt.first]
            names = (form.prompt.first, *form.optional)
            text = text_key(table, [name for name in names if name in table.column_names])
            return lambda index: whole(index) if prompts[index] is None else text(index)

        def prompt(index: int) -> Hashable:
            try:
                messages = read_preference({name: values[index] for name, values in columns.items()}, form)[0]
            except ValueError:  # `encode` names the row
                return ("row", index)
            return json.dumps(messages, sort_keys=True, default=str) if messages else whole(index)

        return prompt
