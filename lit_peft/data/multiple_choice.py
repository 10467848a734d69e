"""Questions with several choices for the answer."""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.benchmark_files import to_hub_columns
from lit_peft.data.benchmarks import apply_benchmark, find_choice_benchmark
from lit_peft.data.collate import PadCollator
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import drop_cut_column
from lit_peft.data.rows import Rows, Split, require_text, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.tasks.squad import normalize_answer
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset


class MultipleChoiceData(LitDataModule):
    """Questions and their choices, each encoded as (question, choice) or (context, question + choice).

    If questions have a `placeholder`, the choice replaces it. The choices are a column of lists, ARC's
    `{"text": [...], "label": [...]}`, or one column each. Empty choices are dropped, and questions may have different
    numbers of choices. The answer is one of ARC's labels, a number, the text of a choice or a letter, tried in this
    order; or a list of correct texts. Batches: `input_ids`, `attention_mask` [all choices, length], `choices` [batch]
    (the number of choices of each question) and `labels` [batch], or for lists [batch, most choices], bool; except for
    training also `texts`, the choices, and for lists `answers`.

    With `benchmark`, the dataset, the columns and the metric that selects the best checkpoint are those of the
    benchmark, see `TextClassificationData`. ReCoRD's choices are the passage's entities, each of which is a row of the
    batch: use a small `batch_size`.

    Args:
        question_column: column of the question.
        choices_column: column of the list of choices.
        choice_columns: the columns of the choices, in order, instead of `choices_column`.
        answer_column: column of the correct choice.
        first_answer: number of the first choice, if answers are numbers: 0 or 1.
        context_column: column of a text that the question is about.
        placeholder: what the choice replaces in a question, such as "@placeholder"; every question must contain it.
        benchmark: "super_glue/copa" or "super_glue/record".
        **common: see `LitDataModule`.
    """

    task = "multiple_choice"

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
            refuse_unused(f"with data.benchmark {benchmark!r}, which sets it", given)
        if choice_columns is not None:
            refuse_unused("with data.choice_columns", {"choices_column": given["choices_column"]})
        self.monitor: tuple[str, str] | None = None
        self._config = ""
        known = find_choice_benchmark(benchmark) if benchmark is not None else None
        if known is not None:
            apply_benchmark(known, common)
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
            needed.update({f"data.choice_columns[{index}]": name for index, name in enumerate(self.choice_columns)})
        return needed if split == "predict" else {**needed, "data.answer_column": self.answer_column}

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; a benchmark's own files get the hub's columns."""
        if self._config:
            table = to_hub_columns(table, self._config, self.answer_column, split, f"{field} {source!r}")
        return super().prepare_table(table, split, field, source)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The question with its context and choices."""
        names = self.choice_columns or [self.choices_column]
        return text_key(table, (self.context_column, self.question_column, *names))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a question, two choices or more and, except for prediction, an answer that is one of them."""
        require_text(rows, (self.question_column, self.context_column))
        given = {name: column_values(rows.table, name) for name in self.columns(split).values() if name}
        several = split != "predict" and any(
            isinstance(given[self.answer_column][index], list) for index in rows.indices
        )
        for index in rows.indices:
            cells = {name: values[index] for name, values in given.items()}
            texts, labels = choices_of(cells, self.choices_column, self.choice_columns)
            # A passage may have a single entity.
            least = 2 if self.placeholder is None else 1
            if len(texts) < least:
                raise LitPeftError(f"{rows.locate(index)} has {len(texts)} choice(s); give at least {least}.")
            question = str(cells[self.question_column])
            if self.placeholder is not None and self.placeholder not in question:
                raise LitPeftError(
                    f"{rows.locate(index)}: column {self.question_column!r} has no {self.placeholder!r} for the choice "
                    f"to replace: {question[:60]!r}; correct it."
                )
            if split == "predict":
                continue
            answer = cells[self.answer_column]
            if several and not isinstance(answer, list):
                raise LitPeftError(
                    f"{rows.locate(index)}: column {self.answer_column!r} is {brief(answer)}, but other rows have "
                    "lists of correct texts; give a list."
                )
            if several and not correct_choices(answer, texts):
                raise LitPeftError(
                    f"{rows.locate(index)}: none of the answers {brief(answer)} in column {self.answer_column!r} is "
                    f"one of the {len(texts)} choices; correct it."
                )
            if not several and find_choice(answer, texts, labels, self.first_answer) is None:
                accepted = labels or [f"{self.first_answer} to {len(texts) - 1 + self.first_answer}", "a letter"]
                raise LitPeftError(
                    f"{rows.locate(index)}: answer {answer!r} in column {self.answer_column!r} is none of the "
                    f"{len(texts)} choices; give {', '.join(accepted)}, or a choice's text."
                )
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens of each choice, cut to `max_length`, the longer side first."""
        table = tokenize(
            rows,
            encode_choices,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            question_column=self.question_column,
            context_column=self.context_column,
            choices_column=self.choices_column,
            choice_columns=self.choice_columns,
            answer_column=None if split == "predict" else self.answer_column,
            first_answer=self.first_answer,
            placeholder=self.placeholder,
            with_texts=split != "train",
            max_length=self.max_length,
        )
        return drop_cut_column(table, self.notes, split, "questions", self.max_length)

    def collator(self, split: Split) -> Collate:
        """As `LitDataModule.collator`, for all choices of all questions."""
        return ChoiceCollator(pad_collator(self))


@dataclass(frozen=True)
class ChoiceCollator:
    """Makes a row of each choice.

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
                labels = [[index in correct for index in range(most)] for correct in labels]
            batch["labels"] = torch.tensor(labels)
        batch.update(
            {key: [example[key] for example in examples] for key in ("texts", "answers") if key in examples[0]}
        )
        return batch


def choices_of(
    cells: dict[str, Any], choices_column: str, choice_columns: list[str] | None
) -> tuple[list[str], list[str]]:
    """Return a row's choices without empty ones, and their labels; no labels if there is not one for each choice."""
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
    texts = non_empty_texts(found)
    return texts, labels if len(labels) == len(texts) else []


def find_choice(answer: Any, texts: list[str], labels: list[str], first: int) -> int | None:
    """Return the index of the choice that an answer names; None if it names none."""
    name = str(answer).strip()
    if name in labels:
        return labels.index(name)
    number = name.removesuffix(".0")
    if number.isdecimal() and 0 <= int(number) - first < len(texts):
        return int(number) - first
    if name in texts:
        return texts.index(name)
    letter = string.ascii_uppercase.find(name.upper()) if len(name) == 1 else -1
    return letter if 0 <= letter < len(texts) else None


def correct_choices(answers: list[Any], texts: list[str]) -> list[int]:
    """Return the indices of the choices that are correct, comparing texts in SQuAD's normal form."""
    correct = {normalize_answer(answer) for answer in non_empty_texts(answers)}
    return [index for index, text in enumerate(texts) if normalize_answer(text) in correct]


def non_empty_texts(cells: list[Any]) -> list[str]:
    """Return cells as text, without empty ones."""
    return [str(cell) for cell in cells if cell is not None and str(cell).strip()]


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
    with_texts: bool,
    max_length: int,
) -> dict[str, list[Any]]:
    """Tokenize questions with each of their choices; `cut` is the number of tokens cut from all choices together."""
    count = len(batch[question_column])
    rows = [{name: values[index] for name, values in batch.items()} for index in range(count)]
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
            correct_choices(answer, texts)
            if isinstance(answer, list)
            else find_choice(answer, texts, labels, first_answer)
            for answer, (texts, labels) in zip(answers, found, strict=True)
        ]
        if with_texts and isinstance(answers[0], list):
            out["answers"] = [non_empty_texts(answer) for answer in answers]
    if with_texts:
        out["texts"] = [texts for texts, _ in found]
    return out
