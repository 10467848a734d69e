"""Questions whose answers are spans of a context."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data.answer_windows import WindowCollator, encode_windows
from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values, fingerprint
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import share_of
from lit_peft.data.rows import Rows, Split, require_text, text_key
from lit_peft.data.squad_rows import parse_answers, unfold_articles
from lit_peft.models.tokenization import require_fast
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset


class QuestionAnsweringData(LitDataModule):
    """Extractive question answering, in SQuAD's forms or as a flat table.

    Files: SQuAD's own json (v1 or v2), or rows of question, context and answers. Answers are
    `{"text": [...], "answer_start": [...]}`, or one text, whose first occurrence in the context is used unless
    `start_column` gives its position. A question may have no answer. A context that does not fit `max_length` is split
    into windows that overlap by `doc_stride` tokens. Training batches consist of windows: `input_ids`,
    `attention_mask` [batch, length], `start_positions`, `end_positions` [batch]; batches for evaluation and prediction
    have all windows of each question (see the task).

    Args:
        question_column: column of the question.
        context_column: column of the context.
        answers_column: column of the answers.
        start_column: column of the index of the answer's first character, if a row has one text as its answer.
        id_column: column of the question's id, which predictions repeat; optional in files.
        doc_stride: tokens by which windows overlap.
        max_question_length: maximum number of tokens of a question; longer questions are cut, which is reported.
        max_answer_length: maximum number of tokens of a predicted answer.
        n_best: how many of the best starts and ends of a window to combine.
        null_answers: whether the model may give no answer; unset: whether some question in the data has none.
        null_threshold: give no answer if its score exceeds the best answer's by more than this.
        max_length: maximum number of tokens of a window.
        **common: see `LitDataModule`.
    """

    task = "question_answering"
    # Long contexts become several windows.
    truncation_sides = ("right",)

    def __init__(
        self,
        question_column: str = "question",
        context_column: str = "context",
        answers_column: str = "answers",
        start_column: str | None = None,
        id_column: str = "id",
        doc_stride: int = 128,
        max_question_length: int = 64,
        max_answer_length: int = 30,
        n_best: int = 20,
        null_answers: bool | None = None,
        null_threshold: float = 0.0,
        max_length: int = 384,
        **common: Any,
    ) -> None:
        super().__init__(max_length=max_length, **common)
        self.question_column = question_column
        self.context_column = context_column
        self.answers_column = answers_column
        self.start_column = start_column
        self.id_column = id_column
        self.doc_stride = doc_stride
        self.max_question_length = max_question_length
        self.max_answer_length = max_answer_length
        self.n_best = n_best
        self.null_answers = null_answers
        self.null_threshold = null_threshold
        for name in ("max_question_length", "max_answer_length", "n_best"):
            if getattr(self, name) < 1:
                raise LitPeftError(f"data.{name} is {getattr(self, name)}; it must be at least 1.")
        # Up to four special tokens; each window must start later than the one before.
        if doc_stride < 0 or max_length - max_question_length - 4 <= doc_stride:
            raise LitPeftError(
                f"data.doc_stride is {doc_stride}, but data.max_length {max_length} and data.max_question_length "
                f"{max_question_length} leave windows of {max_length - max_question_length - 4} tokens; give a smaller "
                "doc_stride, of at least 0, or a larger max_length."
            )

    # ------------------------------------------------------------------------------------------- rows

    def columns(self, split: Split) -> dict[str, str | None]:
        """The question, the context and, except for prediction, the answers."""
        needed: dict[str, str | None] = {
            "data.question_column": self.question_column,
            "data.context_column": self.context_column,
        }
        if split == "predict":
            return needed
        return {**needed, "data.answers_column": self.answers_column, "data.start_column": self.start_column}

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; SQuAD's own json becomes one row per question."""
        if "data" in table.column_names and self.context_column not in table.column_names:
            names = {
                "question": self.question_column,
                "context": self.context_column,
                "answers": self.answers_column,
                "id": self.id_column,
            }
            return table.map(
                unfold_articles,
                batched=True,
                batch_size=1,
                fn_kwargs={"names": names},
                remove_columns=table.column_names,
                new_fingerprint=fingerprint(get_fingerprint(table), names),
            )
        return super().prepare_table(table, split, field, source)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The question with its context."""
        return text_key(table, (self.question_column, self.context_column))

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The context: no context is in two splits."""
        return text_key(table, (self.context_column,))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a question and a context that contains its answers."""
        require_text(rows, (self.question_column, self.context_column))
        if split == "predict":
            return rows
        contexts = column_values(rows.table, self.context_column)
        given = column_values(rows.table, self.answers_column)
        for index in rows.indices:
            if isinstance(given[index], dict) and "text" not in given[index]:
                raise LitPeftError(
                    f"{rows.locate(index)}: column {self.answers_column!r} has {brief(given[index])}; give "
                    '{"text": [...], "answer_start": [...]}, or a text.'
                )
        for index, answers in zip(rows.indices, self._answers(rows), strict=True):
            for text, start in answers:
                context = str(contexts[index])
                if start < 0 or context[start : start + len(text)] != text:
                    place = f"at character {start} of" if start >= 0 else "in"
                    raise LitPeftError(
                        f"{rows.locate(index)}: the answer {text[:60]!r} is not {place} the context; correct it."
                    )
        return rows

    def _answers(self, rows: Rows) -> list[list[tuple[str, int]]]:
        answers = column_values(rows.table, self.answers_column)
        starts = column_values(rows.table, self.start_column) if self.start_column else None
        contexts = column_values(rows.table, self.context_column)
        return [
            parse_answers(answers[index], starts[index] if starts else None, str(contexts[index]))
            for index in rows.indices
        ]

    @cached_property
    def _may_be_unanswered(self) -> bool:
        if self.null_answers is not None:
            return self.null_answers
        return any(
            not answers for split, rows in self.rows.items() if split != "predict" for answers in self._answers(rows)
        )

    # ----------------------------------------------------------------------------------------- tokens

    def encode(self, rows: Rows, split: Split) -> Any:
        """Windows of tokens: each one an example for training, else all windows of a question."""
        require_fast(self.tokenizer)
        table = tokenize(
            rows,
            encode_windows,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            question_column=self.question_column,
            context_column=self.context_column,
            answers_column=None if split == "predict" else self.answers_column,
            start_column=self.start_column,
            id_column=self.id_column if self.id_column in rows.table.column_names else None,
            doc_stride=self.doc_stride,
            max_question_length=self.max_question_length,
            max_length=self.max_length,
            grouped=split != "train",
        )
        cut = sum(column_values(table, "cut"))
        if cut:
            self.notes.add(
                f"data.{split}: {share_of(cut, len(rows), 'questions')} cut to {self.max_question_length} tokens "
                "(data.max_question_length)."
            )
        if split == "train" and len(table) > len(rows):
            self.notes.add(
                f"data.{split}: {len(rows):,} questions became {len(table):,} windows of {self.max_length} tokens."
            )
        return table.remove_columns("cut")

    def collator(self, split: Split) -> Collate:
        """As `LitDataModule.collator`, with the positions of answers and the settings of their search."""
        search = {
            "n_best": self.n_best,
            "max_answer_length": self.max_answer_length,
            "null_answers": split != "train" and self._may_be_unanswered,
            "null_threshold": self.null_threshold,
        }
        return WindowCollator(pad_collator(self), search)
