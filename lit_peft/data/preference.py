"""Prompts with a better and a worse answer, or with one answer that is good or bad."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import pad_collator
from lit_peft.data.chat_rendering import ChatRenderer, unused_fields
from lit_peft.data.chats import TEMPLATE_COLUMNS
from lit_peft.data.comparisons import ComparisonData
from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values, fingerprint
from lit_peft.data.instruction import filled_columns
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import note_lost_labels, note_missing_end, share_of
from lit_peft.data.preference_encoding import PreferenceCollator, add_mismatched, encode_preferences, split_answers
from lit_peft.data.preference_forms import (
    Columns,
    PreferenceForm,
)
from lit_peft.data.prompt_templates import TEMPLATES
from lit_peft.data.rows import Rows, Split, require_text
from lit_peft.data.settings import refuse_unused
from lit_peft.models.sources import resolve_base
from lit_peft.util.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset


class PreferenceData(ComparisonData):
    """Prompts with a chosen and a rejected answer, or with one answer and a label, for the task `preference`.

    The form is found from the columns, and the banner names it. Pairs: `prompt`, `chosen` and `rejected` as text or as
    messages; messages in `chosen` and `rejected` alone, whose common start is the prompt; Alpaca's `instruction`,
    `input`, `system` and `history` or ShareGPT's `conversations`, with `chosen` and `rejected` (LLaMA-Factory's files);
    or Anthropic's dialogues ("\\n\\nHuman: …\\n\\nAssistant: …") in `chosen` and `rejected`, or in `prompt`. Single
    answers, for KTO: `prompt`, `completion` and `label` (true or false), as text or as messages; or messages whose last
    turn is the answer, and `label` or `kto_tag`.

    Chats are rendered by the tokenizer's chat template, and so are prompts and instructions if there is one. The loss
    is on the answers with their end-of-turn or end-of-text token. Batches: see `lit_peft.tasks.preference.Preference`;
    of an encoder-decoder, the prompt is the source. Rows whose answers are the same are left out; so are those of which
    `max_length` leaves nothing of an answer. Both are counted and reported. Prediction reads the same columns.

    Args:
        prompt_column: column of the prompt, the instruction or the conversation; unset: it is found.
        chosen_column: column of the better answer.
        rejected_column: column of the worse answer.
        completion_column: column of a single answer; unset: it is found.
        label_column: column that says whether a single answer is good; unset: it is found.
        input_column: column of an instruction's input; optional in rows and in files.
        system_column: column of the system prompt; optional in rows and in files.
        history_column: column of earlier [question, answer] pairs; optional in rows and in files.
        template: how prompts are rendered: `chat`, by the tokenizer's chat template; `alpaca`; `llm_adapters` (see
            `fill_template`); or `plain`, the prompt alone. Unset: `chat` if there is a chat template, else `alpaca` for
            instructions, Anthropic's form for its dialogues, and `plain` for prompts.
        chat_template: the chat template, or a file with it (also `pkg:DISTRIBUTION/path`), instead of the tokenizer's.
        padding_free: run the model on the answers of a batch joined to rows of at most `max_length` tokens, so that
            there is almost no padding. No answer attends to another. Not for encoder-decoders and not for methods with
            virtual tokens.
        unpair: take the answers of pairs by themselves, the chosen ones as good, the rejected ones as bad, for KTO.
        **common: see `LitDataModule`.
    """

    task = "preference"

    def __init__(
        self,
        prompt_column: str | None = None,
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        completion_column: str | None = None,
        label_column: str | None = None,
        input_column: str = "input",
        system_column: str = "system",
        history_column: str = "history",
        template: str | None = None,
        chat_template: str | None = None,
        unpair: bool = False,
        padding_free: bool = False,
        **common: Any,
    ) -> None:
        named = Columns(
            prompt_column,
            chosen_column,
            rejected_column,
            completion_column,
            label_column,
            input_column,
            system_column,
            history_column,
        )
        super().__init__(named, chat_template, **common)
        self.template = template
        self.unpair = unpair
        self.padding_free = padding_free
        if template not in (None, "chat", *TEMPLATES):
            raise LitPeftError(
                f"data.template {template!r} is not known: use {closest(str(template), ('chat', *TEMPLATES))}."
            )
        refuse_unused(
            f"with data.template {template!r}", {"chat_template": chat_template is not None and template in TEMPLATES}
        )
        # The form of the table that was read last.
        self._form: PreferenceForm | None = None

    @cached_property
    def is_encoder_decoder(self) -> bool:
        """Whether the base model is an encoder-decoder, whose prompts and answers are apart."""
        if self.base is None:
            return False
        from transformers import AutoConfig

        # A tokenizer's folder has no configuration, and the model's own code is not run for this.
        with suppress(OSError, ValueError, LitPeftError):
            config = AutoConfig.from_pretrained(
                resolve_base(self.base).path, revision=self.revision, trust_remote_code=False
            )
            return bool(config.is_encoder_decoder)
        return False

    @property
    def learns_tokens(self) -> bool:  # type: ignore[override]
        """Whether the answers follow their prompts; those of an encoder-decoder are apart."""
        return not self.is_encoder_decoder

    @property
    def rows_per_example(self) -> int:  # type: ignore[override]
        """The rows that an example has in a batch, one for each answer."""
        return 1 if self.is_unpaired else 2

    @property
    def is_unpaired(self) -> bool | None:
        """Whether the examples are single answers; None until a table is read."""
        return None if self._form is None else self.unpair or self._form.label is not None

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; it also finds the form of the rows, and notes it."""
        form = self.form_of(table)
        if self._form is not None and (form.label is None) != (self._form.label is None):
            raise LitPeftError(
                f"{field} {source!r} has {form.describe()}, and other data has {self._form.describe()}: give either "
                "pairs or single answers."
            )
        self.forms[split] = self._form = form
        if self.unpair and form.label is not None:
            raise LitPeftError(f"data.unpair is set, but {field} {source!r} has single answers already: leave it out.")
        self.optional_columns = (*form.optional, *self._template_columns(table, form))
        if set(form.columns) <= set(table.column_names):
            style = self.style(form)
            by = "rendered by the tokenizer's chat template" if style == "chat" else f"in the form {style!r}"
            alone = ", each answer by itself" if self.unpair else ""
            self.notes.add(f"{field}: {form.describe()}, {by}{alone}.")
            self.note_unread(form, table, field)
        return super().prepare_table(table, split, field, source)

    def style(self, form: PreferenceForm) -> str:
        """Return how rows of this form are rendered: see `template`."""
        if form.kind == "messages":
            refuse_unused("with messages", {"template": self.template in TEMPLATES})
            return "chat"
        plain = "alpaca" if form.is_alpaca else "dialogue" if form.kind == "dialogue" else "plain"
        has_template = getattr(self.tokenizer, "chat_template", None)
        return self.template or ("chat" if has_template else plain)

    def _template_columns(self, table: Dataset, form: PreferenceForm) -> list[str]:
        return [name for name in TEMPLATE_COLUMNS if name in table.column_names and self.style(form) == "chat"]

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs text or messages in each of its columns; messages are checked when they are read."""
        form = self.form_of(rows.table)
        if form.kind != "messages":
            require_text(rows, form.columns)
            return rows
        for column in form.columns:
            cells = column_values(rows.table, column)
            empty = next((index for index in rows.indices if cells[index] is None or cells[index] in ("", [])), None)
            if empty is not None:
                raise LitPeftError(f"{rows.locate(empty)} has nothing in column {column!r}; remove the row.")
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels of each answer with its prompt, at most `max_length`."""
        form = self.form_of(rows.table)
        style = self.style(form)
        if style == "chat" and not getattr(self.tokenizer, "chat_template", None):
            raise LitPeftError(
                f"{rows.field} {rows.source!r} has {form.describe()}, but the tokenizer of {self.base!r} has no chat "
                "template; set data.chat_template, or use the instruct version of the base model."
            )
        columns = self._template_columns(rows.table, form)
        if style == "chat":
            unused = unused_fields(self.tokenizer, [name for name in columns if name != TEMPLATE_COLUMNS[-1]])
            if unused:
                self.notes.add(f"{rows.field}: the chat template does not read {', '.join(map(repr, unused))}.")
            if ChatRenderer(self.tokenizer).end_of_turn() == "":
                self.notes.add("The chat template does not end the assistant's turn, so its end is no part of answers.")
        else:
            note_missing_end(self.notes, self.tokenizer)
        table = tokenize(
            rows,
            encode_preferences,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            form=form,
            style=style,
            template_columns=columns,
            filled_columns=filled_columns(rows.table),
            max_length=self.max_length,
            truncation_side=self.truncation_side,
            is_encoder_decoder=self.is_encoder_decoder,
            needs_all=split == "predict",
        )
        table = self._without_skipped(table, split)
        if not self.is_unpaired:
            return table.select_columns(["input_ids", "labels"])
        return self._alone(table)

    def _without_skipped(self, table: Dataset, split: Split) -> Dataset:
        """Note what was cut, and leave out the rows that cannot be used."""
        reasons = column_values(table, "left_out")
        counts = {
            name: [count for counts in column_values(table, name) for count in counts]
            for name in ("length", "supervised", "lost")
        }
        limit = self.max_length
        cuts = [length - limit for length in counts["length"] if length > limit]
        if cuts:
            end = "start" if self.truncation_side == "left" else "end"
            self.notes.add(
                f"data.{split}: {share_of(len(cuts), len(counts['length']), 'answers with their prompts')} cut to "
                f"{limit} tokens at the {end} (data.max_length); {sum(cuts):,} tokens lost."
            )
        note_lost_labels(self.notes, split, counts["length"], counts["supervised"], counts["lost"], limit)
        for reason in sorted(set(filter(None, reasons))):
            why = f"because data.max_length {limit} leaves nothing of an answer" if reason == "length" else reason
            dropped = share_of(sum(found == reason for found in reasons), len(reasons), "rows")
            self.notes.add(f"data.{split}: {dropped} left out{',' if reason == 'length' else ''} {why}.")
        kept = [index for index, reason in enumerate(reasons) if not reason]
        if not kept and not self.streaming:
            raise LitPeftError(
                f"data.{split} has no row whose answers can be compared within data.max_length {limit}: see the notes "
                "on what was left out, raise max_length or give other rows."
            )
        return table.select(kept) if len(kept) < len(table) else table

    def _alone(self, table: Dataset) -> Dataset:
        """Return the answers by themselves, each with the answer to another prompt."""
        if not len(table):
            return table
        key = fingerprint(get_fingerprint(table), "split_answers")
        table = table.map(
            split_answers,
            batched=True,
            remove_columns=table.column_names,
            new_fingerprint=key,
            desc="Splitting pairs",
        )
        settings = {"is_encoder_decoder": self.is_encoder_decoder}
        return table.map(
            add_mismatched,
            batched=True,
            with_indices=True,
            fn_kwargs={"table": table, **settings},
            new_fingerprint=fingerprint(key, "add_mismatched", sorted(settings.items())),
            desc="Pairing prompts with other answers",
        )

    def collator(self, split: Split) -> Collate:
        """Return the function that joins the examples of a split into a batch."""
        if self.padding_free and self.is_encoder_decoder:
            raise LitPeftError(
                f"data.padding_free is set, but {self.base!r} is an encoder-decoder, whose prompts and answers are "
                "apart: leave it out."
            )
        return PreferenceCollator(pad_collator(self), self.max_length, self.is_encoder_decoder, self.padding_free)
