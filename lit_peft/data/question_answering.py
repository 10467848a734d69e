"""Questions whose answers are spans of a text."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, Rows, Split
from lit_peft.data.collate import PadCollator
from lit_peft.data.files import column_values, fingerprint
from lit_peft.data.text_classification import number
from lit_peft.models.tokenization import require_fast
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

_NOWHERE = (-1, -1)


class QuestionAnsweringData(LitDataModule):
    """Extractive question answering, in SQuAD's forms or as a flat table.

    Files: SQuAD's own json (v1 or v2), or rows of question, context and answers, where answers are
    `{"text": [...], "answer_start": [...]}`, or one text, which is looked for in the context unless `start_column`
    says where it stands. No answer at all is one, too. A context that does not fit `max_length` is read in windows
    that overlap by `doc_stride` tokens. Training batches hold windows: `input_ids`, `attention_mask` [batch, length],
    `start_positions`, `end_positions` [batch]; those to evaluate and predict hold all windows of each question (see
    the task).

    Args:
        question_column: column of the question.
        context_column: column of the text.
        answers_column: column of the answers.
        start_column: column of the character the answer starts at, where answers are one text to a row.
        id_column: column that names a question in predictions; left out where there is none.
        doc_stride: tokens by which windows overlap.
        max_question_length: longest question, in tokens; longer ones are cut and counted.
        max_answer_length: longest answer to give, in tokens.
        n_best: how many of the best starts and ends of a window to try with each other.
        null_answers: whether there may be no answer; unset: whether some question given has none.
        null_threshold: no answer where its score exceeds the best answer's by more than this.
        max_length: longest window, in tokens.
        **common: see `LitDataModule`.
    """

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
        # Four special tokens at the most, and each window needs to move on.
        if doc_stride < 0 or max_length - max_question_length - 4 <= doc_stride:
            raise LitPeftError(
                f"data.doc_stride is {doc_stride}, and data.max_length {max_length} less data.max_question_length "
                f"{max_question_length} leaves windows of {max_length - max_question_length - 4} tokens: give a stride "
                "of at least 0 that is less."
            )

    # ------------------------------------------------------------------------------------------- rows

    def columns(self, split: Split) -> dict[str, str | None]:
        """Question and context; answers except for prediction."""
        needed: dict[str, str | None] = {
            "data.question_column": self.question_column,
            "data.context_column": self.context_column,
        }
        if split == "predict":
            return needed
        return {**needed, "data.answers_column": self.answers_column, "data.start_column": self.start_column}

    def prepared(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """Unfold SQuAD's own json into rows."""
        if "data" in table.column_names and self.context_column not in table.column_names:
            names = {
                "question": self.question_column,
                "context": self.context_column,
                "answers": self.answers_column,
                "id": self.id_column,
            }
            return table.map(
                unfold,
                batched=True,
                batch_size=1,
                fn_kwargs={"names": names},
                remove_columns=table.column_names,
                new_fingerprint=fingerprint(table, names),
            )
        return super().prepared(table, split, field, source)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The question with its context."""
        return self.text_key(table, (self.question_column, self.context_column))

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The context: no text stands on both sides of a split."""
        return self.text_key(table, (self.context_column,))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a question and a context, which its answers stand in."""
        self.require_text(rows, (self.question_column, self.context_column))
        if split == "predict":
            return rows
        contexts = column_values(rows.table, self.context_column)
        given = column_values(rows.table, self.answers_column)
        for row in rows.numbers:
            if isinstance(given[row], dict) and "text" not in given[row]:
                raise LitPeftError(
                    f"{rows.where(row)}: column {self.answers_column!r} holds {brief(given[row])}; answers are "
                    '{"text": [...], "answer_start": [...]}, or a text.'
                )
        for row, answers in zip(rows.numbers, self._answers(rows), strict=True):
            for text, start in answers:
                context = str(contexts[row])
                if start < 0 or context[start : start + len(text)] != text:
                    place = f"at character {start} of" if start >= 0 else "in"
                    raise LitPeftError(
                        f"{rows.where(row)}: the answer {text[:60]!r} does not stand {place} the context; correct it."
                    )
        return rows

    def _answers(self, rows: Rows) -> list[list[tuple[str, int]]]:
        answers = column_values(rows.table, self.answers_column)
        starts = column_values(rows.table, self.start_column) if self.start_column else None
        contexts = column_values(rows.table, self.context_column)
        return [answers_of(answers[row], starts[row] if starts else None, str(contexts[row])) for row in rows.numbers]

    @cached_property
    def _may_have_none(self) -> bool:
        if self.null_answers is not None:
            return self.null_answers
        return any(
            not answers for split, rows in self.rows.items() if split != "predict" for answers in self._answers(rows)
        )

    # ----------------------------------------------------------------------------------------- tokens

    def encode(self, rows: Rows, split: Split) -> Any:
        """Windows of tokens: one to an example for training, else all of a question."""
        require_fast(self.tokenizer)
        table = self.tokenized(
            rows,
            encode_windows,
            f"Tokenizing {split}",
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
            self.say(
                f"data.{split}: {cut} question(s) cut to {self.max_question_length} tokens (data.max_question_length)."
            )
        if split == "train" and len(table) > len(rows):
            self.say(f"data.{split}: {len(rows)} questions in {len(table)} windows of {self.max_length} tokens.")
        return table.remove_columns("cut")

    def collator(self, split: Split) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """As `LitDataModule.collator`, with positions, and with what tells the answer from them."""
        search = {
            "n_best": self.n_best,
            "max_answer_length": self.max_answer_length,
            "null_answers": split != "train" and self._may_have_none,
            "null_threshold": self.null_threshold,
        }
        return WindowCollator(self.padding(), search)


@dataclass(frozen=True)
class WindowCollator:
    """Pads windows; those of questions with several become rows one after the other.

    Attributes:
        pad: pads the tokens.
        search: settings of `lit_peft.tasks.squad.find_answer`.
    """

    pad: PadCollator
    search: dict[str, Any]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        if "offsets" not in examples[0]:
            batch: dict[str, Any] = dict(self.pad(examples))
            for key in ("start_positions", "end_positions"):
                batch[key] = torch.tensor([example[key] for example in examples])
            return self._shifted(batch)
        tokens = [key for key in ("input_ids", "token_type_ids") if key in examples[0]]
        rows: list[dict[str, Any]] = [
            {key: example[key][at] for key in tokens} for example in examples for at in range(len(example["input_ids"]))
        ]
        batch = dict(self.pad(rows))
        for key in ("start_positions", "end_positions"):
            if key in examples[0]:
                batch[key] = torch.tensor([place for example in examples for place in example[key]])
        batch["nulls"] = torch.tensor([place for example in examples for place in example["nulls"]])
        batch["windows"] = torch.tensor([len(example["input_ids"]) for example in examples])
        places = [torch.tensor(window) for example in examples for window in example["offsets"]]
        offsets = torch.full((*batch["input_ids"].shape, 2), -1)
        for row, window in enumerate(places):
            at = int(batch["attention_mask"][row].argmax())
            offsets[row, at : at + len(window)] = window
        batch["offsets"] = offsets
        for name, key in (("id", "ids"), ("context", "contexts"), ("answers", "answers")):
            if name in examples[0]:
                batch[key] = [example[name] for example in examples]
        batch["search"] = dict(self.search)
        return self._shifted(batch)

    def _shifted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Positions count from the batch's first column, padding included."""
        begin = batch["attention_mask"].argmax(-1)
        for key in ("start_positions", "end_positions", "nulls"):
            if key in batch:
                batch[key] = batch[key] + begin
        return batch


def unfold(batch: dict[str, list[Any]], names: dict[str, str]) -> dict[str, list[Any]]:
    """Make rows of SQuAD's articles, paragraphs and questions."""
    out: dict[str, list[Any]] = {name: [] for name in names.values()}
    for articles in batch["data"]:
        for article in articles if isinstance(articles, list) else [articles]:
            for paragraph in _member(article, "paragraphs", list):
                for question in _member(paragraph, "qas", list):
                    # A question marked impossible has no answer, whatever else it says.
                    stated = not _member(question, "is_impossible", (bool, type(None)))
                    answers = (_member(question, "answers", (list, type(None))) or []) if stated else []
                    out[names["id"]].append(str(question.get("id")))
                    out[names["question"]].append(_member(question, "question", str))
                    out[names["context"]].append(_member(paragraph, "context", str))
                    out[names["answers"]].append(
                        {
                            "text": [_member(answer, "text", str) for answer in answers],
                            "answer_start": [_member(answer, "answer_start", int) for answer in answers],
                        }
                    )
    return out


def _member(item: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """A part of SQuAD's json.

    Raises:
        LitPeftError: it is missing or of another kind.
    """
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(value, kind):
        raise LitPeftError(
            "A SQuAD file has articles with 'paragraphs', these 'context' and 'qas', these 'question' and 'answers' "
            f"with 'text' and 'answer_start'; this one has {key!r} = {brief(value)} in {brief(item)}."
        )
    return value


def answers_of(answers: Any, start: Any, context: str) -> list[tuple[str, int]]:
    """Return a row's answers with the character each starts at (-1: it is not in the context); none: an empty list."""
    if isinstance(answers, dict):
        texts, starts = _listed(answers.get("text")), _listed(answers.get("answer_start"))
    elif isinstance(answers, list):
        texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
        starts = [answer["answer_start"] for answer in answers if isinstance(answer, dict) and "answer_start" in answer]
    else:
        texts = [str(answers)] if answers is not None and str(answers).strip() else []
        starts = [] if start is None or not str(start).strip() else [start]
    if len(starts) != len(texts):
        starts = [context.find(str(text)) for text in texts]
    places = [number(start) for start in starts]
    return [(str(text), -1 if at is None else int(at)) for text, at in zip(texts, places, strict=True)]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def encode_windows(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    question_column: str,
    context_column: str,
    answers_column: str | None,
    start_column: str | None,
    id_column: str | None,
    doc_stride: int,
    max_question_length: int,
    max_length: int,
    grouped: bool,
) -> dict[str, list[Any]]:
    """Tokenize questions with their contexts into windows; a window without the answer is answered by its first token.

    That token is the classification token where there is one. `cut` tells whether the question was cut, in its first
    window.
    """
    questions, cuts = _cut_questions([str(text) for text in batch[question_column]], tokenizer, max_question_length)
    contexts = [str(text) for text in batch[context_column]]
    encoded = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    flat: dict[str, list[Any]] = {key: list(encoded[key]) for key in keys}
    owners = encoded["overflow_to_sample_mapping"]
    flat["offsets"], flat["nulls"] = [], []
    for at, places in enumerate(encoded["offset_mapping"]):
        sides = encoded.sequence_ids(at)
        flat["offsets"].append([place if side == 1 else _NOWHERE for place, side in zip(places, sides, strict=True)])
        ids = flat["input_ids"][at]
        flat["nulls"].append(ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0)
    answers: list[list[tuple[str, int]]] = []
    if answers_column is not None:
        starts = batch[start_column] if start_column else [None] * len(questions)
        cells = zip(batch[answers_column], starts, contexts, strict=True)
        answers = [answers_of(answer, start, context) for answer, start, context in cells]
        spans = [_positions(flat["offsets"][at], answers[owner], flat["nulls"][at]) for at, owner in enumerate(owners)]
        flat["start_positions"], flat["end_positions"] = [first for first, _ in spans], [last for _, last in spans]
    if not grouped:
        flat["cut"] = [int(cuts[owner] and owners[at - 1 : at] != [owner]) for at, owner in enumerate(owners)]
        return {key: value for key, value in flat.items() if key not in ("offsets", "nulls")}
    out: dict[str, list[Any]] = {key: [[] for _ in questions] for key in flat}
    for at, owner in enumerate(owners):
        for key, values in flat.items():
            out[key][owner].append(values[at])
    out["context"], out["cut"] = contexts, [int(cut) for cut in cuts]
    if id_column is not None:
        out["id"] = [str(name) for name in batch[id_column]]
    if answers:
        out["answers"] = [[text for text, _ in row] for row in answers]
    return out


def _cut_questions(questions: list[str], tokenizer: Any, longest: int) -> tuple[list[str], list[bool]]:
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = encoded["offset_mapping"]
    cuts = [len(row) > longest for row in places]
    kept = [
        question[: row[longest - 1][1]] if cut else question
        for question, row, cut in zip(questions, places, cuts, strict=True)
    ]
    return kept, cuts


def _positions(places: list[tuple[int, int]], answers: list[tuple[str, int]], null: int) -> tuple[int, int]:
    """First and last token of the first answer, or twice the null token where the window has not the whole of it."""
    if not answers:
        return null, null
    text, begin = answers[0]
    end = begin + len(text)
    inside = [
        at for at, (first, last) in enumerate(places) if first >= 0 and last > begin and first < end and last > first
    ]
    context = [place for place in places if place[0] >= 0]
    if not inside or not context or context[0][0] > begin or context[-1][1] < end:
        return null, null
    return inside[0], inside[-1]
