"""Questions with several answers to choose from."""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, Rows, Split, refuse_unread
from lit_peft.data.benchmarks import fill_in, find_choice_benchmark
from lit_peft.data.collate import PadCollator
from lit_peft.data.files import column_values
from lit_peft.data.original_files import hub_form
from lit_peft.tasks.squad import normalize_answer
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset


class MultipleChoiceData(LitDataModule):
    """Questions and their choices, each choice encoded as (question, choice), or (context, question + choice); where
    questions have a `placeholder`, the choice stands in its place.

    The choices are a column of lists, ARC's `{"text": [...], "label": [...]}`, or a column each; empty ones do not
    count, and questions may differ in their number. The answer is one of ARC's labels, a number, the text of a choice
    or a letter, tried in this order; or a list of texts, each of which is right. Batches: `input_ids`, `attention_mask`
    [all choices, length], `choices` [batch], how many each question has, and `labels` [batch], or of lists [batch, most
    choices], bool; except to train, the choices' `texts`, and of lists the `answers`.

    With `benchmark`, dataset, columns and the metric that tells the best checkpoint are that benchmark's, as
    `TextClassificationData` has it. ReCoRD's choices are the passage's entities, each a row: take a small `batch_size`.

    Args:
        question_column: column of the question.
        choices_column: column of the list of choices.
        choice_columns: the columns of the choices, in order, instead of `choices_column`.
        answer_column: column of the right choice.
        first_answer: what the first choice is numbered by, where answers are numbers: 0 or 1.
        context_column: column of a text the question is about.
        placeholder: what stands for the choice in a question, such as "@placeholder"; all questions need it then.
        benchmark: "super_glue/copa" or "super_glue/record".
        **common: see `LitDataModule`.
    """

    def __init__(
        self,
        question_column: str = "question",
        choices_column: str = "choices",
        choice_columns: list[str] | None = None,
        answer_column: str = "answer",
        first_answer: int = 0,
        context_column: str | None = None,
        placeholder: str | None = None,
        benchmark: str | None = None,
        **common: Any,
    ) -> None:
        given = {
            "question_column": question_column != "question",
            "choices_column": choices_column != "choices",
            "choice_columns": choice_columns is not None,
            "answer_column": answer_column != "answer",
            "first_answer": first_answer != 0,
            "context_column": context_column is not None,
            "placeholder": placeholder is not None,
        }
        if benchmark is not None:
            refuse_unread(f"with data.benchmark {benchmark!r}, which says that itself", given)
        if choice_columns is not None:
            refuse_unread("with data.choice_columns", {"choices_column": given["choices_column"]})
        self.monitor: tuple[str, str] | None = None
        self._config = ""
        known = find_choice_benchmark(benchmark) if benchmark is not None else None
        if known is not None:
            fill_in(known, common)
            self._config = known.config
            self.monitor, self.drops_overlap = (known.monitor, "max"), False
        super().__init__(**common)
        self.question_column = question_column
        self.choices_column = choices_column
        self.choice_columns = choice_columns
        self.answer_column = answer_column
        self.first_answer = first_answer
        self.context_column = context_column
        self.placeholder = placeholder
        for name, value in known.columns.items() if known is not None else ():
            setattr(self, name, value)
        if choice_columns is not None and len(choice_columns) < 2:
            raise LitPeftError(f"data.choice_columns is {choice_columns}; name at least two columns.")

    def columns(self, split: Split) -> dict[str, str | None]:
        """The question, the context, the choices and, except for prediction, the answer."""
        needed = {"data.question_column": self.question_column, "data.context_column": self.context_column}
        if self.choice_columns is None:
            needed["data.choices_column"] = self.choices_column
        else:
            needed.update({f"data.choice_columns[{at}]": name for at, name in enumerate(self.choice_columns)})
        return needed if split == "predict" else {**needed, "data.answer_column": self.answer_column}

    def prepared(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepared`; a benchmark's own files get the hub's columns."""
        if self._config:
            table = hub_form(table, self._config, self.answer_column, split, f"{field} {source!r}")
        return super().prepared(table, split, field, source)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The question with its context and choices."""
        names = self.choice_columns or [self.choices_column]
        return self.text_key(table, (self.context_column, self.question_column, *names))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a question, at least two choices and an answer that is one of them."""
        self.require_text(rows, (self.question_column, self.context_column))
        given = {name: column_values(rows.table, name) for name in self.columns(split).values() if name}
        several = split != "predict" and any(isinstance(given[self.answer_column][row], list) for row in rows.numbers)
        for row in rows.numbers:
            cells = {name: values[row] for name, values in given.items()}
            texts, labels = choices_of(cells, self.choices_column, self.choice_columns)
            # A passage may name one entity alone.
            least = 2 if self.placeholder is None else 1
            if len(texts) < least:
                raise LitPeftError(f"{rows.where(row)} has {len(texts)} choice(s); at least {least} needed.")
            question = str(cells[self.question_column])
            if self.placeholder is not None and self.placeholder not in question:
                raise LitPeftError(
                    f"{rows.where(row)}: column {self.question_column!r} has no {self.placeholder!r} for the choice "
                    f"to stand in: {question[:60]!r}; correct it."
                )
            if split == "predict":
                continue
            answer = cells[self.answer_column]
            if several and not isinstance(answer, list):
                raise LitPeftError(
                    f"{rows.where(row)}: column {self.answer_column!r} is {brief(answer)}, and other rows have lists "
                    "of right texts; give one."
                )
            if several and not right_ones(answer, texts):
                raise LitPeftError(
                    f"{rows.where(row)}: of the answers {brief(answer)} in column {self.answer_column!r} none is one "
                    f"of the {len(texts)} choices; correct it."
                )
            if not several and answer_of(answer, texts, labels, self.first_answer) is None:
                known = labels or [f"{self.first_answer} to {len(texts) - 1 + self.first_answer}", "a letter"]
                raise LitPeftError(
                    f"{rows.where(row)}: answer {answer!r} in column {self.answer_column!r} is none of the "
                    f"{len(texts)} choices; give {', '.join(known)}, or a choice's text."
                )
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens of each choice, cut to `max_length`, the longer side first."""
        table = self.tokenized(
            rows,
            encode_choices,
            f"Tokenizing {split}",
            question_column=self.question_column,
            context_column=self.context_column,
            choices_column=self.choices_column,
            choice_columns=self.choice_columns,
            answer_column=None if split == "predict" else self.answer_column,
            first_answer=self.first_answer,
            placeholder=self.placeholder,
            keep=split != "train",
            max_length=self.max_length,
        )
        return self.without_cuts(table, split, "questions")

    def collator(self, split: Split) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """As `LitDataModule.collator`, for all choices of all questions."""
        return ChoiceCollator(self.padding())


@dataclass(frozen=True)
class ChoiceCollator:
    """Makes each choice a row.

    Attributes:
        pad: pads the rows.
    """

    pad: PadCollator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        keys = [key for key in ("input_ids", "token_type_ids") if key in examples[0]]
        rows = [
            dict(zip(keys, row, strict=True))
            for example in examples
            for row in zip(*(example[key] for key in keys), strict=True)
        ]
        batch: dict[str, Any] = dict(self.pad(rows))
        batch["choices"] = torch.tensor([len(example["input_ids"]) for example in examples])
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            if isinstance(labels[0], list):
                most = int(batch["choices"].max())
                labels = [[at in right for at in range(most)] for right in labels]
            batch["labels"] = torch.tensor(labels)
        batch.update(
            {key: [example[key] for example in examples] for key in ("texts", "answers") if key in examples[0]}
        )
        return batch


def choices_of(
    cells: dict[str, Any], choices_column: str, choice_columns: list[str] | None
) -> tuple[list[str], list[str]]:
    """Return a row's choices, and their labels if they have some; empty choices are left out."""
    labels: list[str] = []
    found: Any
    if choice_columns is not None:
        found = [cells[name] for name in choice_columns]
    else:
        found = cells[choices_column]
        if isinstance(found, dict):
            labels = [str(label) for label in found.get("label") or ()]
            found = found.get("text")
    found = found if isinstance(found, list) else []
    texts = [str(choice) for choice in found if choice is not None and str(choice).strip()]
    return texts, labels if len(labels) == len(texts) else []


def answer_of(answer: Any, texts: list[str], labels: list[str], first: int) -> int | None:
    """Return which choice an answer names, or None if it names none."""
    said = str(answer).strip()
    if said in labels:
        return labels.index(said)
    number = said.removesuffix(".0")
    if number.isdecimal() and 0 <= int(number) - first < len(texts):
        return int(number) - first
    if said in texts:
        return texts.index(said)
    letter = string.ascii_uppercase.find(said.upper()) if len(said) == 1 else -1
    return letter if 0 <= letter < len(texts) else None


def right_ones(answers: list[Any], texts: list[str]) -> list[int]:
    """Return which choices are one of the right texts, normalized as SQuAD has it."""
    golds = {normalize_answer(gold) for gold in gold_texts(answers)}
    return [at for at, text in enumerate(texts) if normalize_answer(text) in golds]


def gold_texts(answers: list[Any]) -> list[str]:
    """Return the right texts without empty ones."""
    return [str(gold) for gold in answers if gold is not None and str(gold).strip()]


def encode_choices(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    question_column: str,
    context_column: str | None,
    choices_column: str,
    choice_columns: list[str] | None,
    answer_column: str | None,
    first_answer: int,
    placeholder: str | None,
    keep: bool,
    max_length: int,
) -> dict[str, list[Any]]:
    """Tokenize questions with each of their choices; `cut` is how many tokens were cut away, from all of them."""
    count = len(batch[question_column])
    rows = [{name: values[at] for name, values in batch.items()} for at in range(count)]
    found = [choices_of(row, choices_column, choice_columns) for row in rows]
    firsts, seconds = [], []
    for row, (texts, _) in zip(rows, found, strict=True):
        question = str(row[question_column])
        firsts += [str(row[context_column]) if context_column else question] * len(texts)
        if placeholder is not None:
            seconds += [question.replace(placeholder, text) for text in texts]
        else:
            seconds += [f"{question} {text}" for text in texts] if context_column else texts
    over = [max(0, len(ids) - max_length) for ids in tokenizer(firsts, seconds, verbose=False)["input_ids"]]
    encoded = tokenizer(firsts, seconds, truncation="longest_first", max_length=max_length)
    ends = [*accumulate((len(texts) for texts, _ in found), initial=0)]
    pieces = [slice(start, end) for start, end in pairwise(ends)]
    out: dict[str, list[Any]] = {
        key: [list(encoded[key][piece]) for piece in pieces]
        for key in ("input_ids", "token_type_ids")
        if key in encoded
    }
    out["cut"] = [sum(over[piece]) for piece in pieces]
    if answer_column is not None:
        answers = batch[answer_column]
        out["labels"] = [
            right_ones(answer, texts) if isinstance(answer, list) else answer_of(answer, texts, labels, first_answer)
            for answer, (texts, labels) in zip(answers, found, strict=True)
        ]
        if keep and isinstance(answers[0], list):
            out["answers"] = [gold_texts(answer) for answer in answers]
    if keep:
        out["texts"] = [texts for texts, _ in found]
    return out
