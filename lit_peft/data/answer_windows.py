"""Windows of a context's tokens, and the positions of an answer in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_peft.data.collate import PadCollator
from lit_peft.data.squad_rows import parse_answers

_OUTSIDE = (-1, -1)


@dataclass(frozen=True)
class WindowCollator:
    """Pads windows; the windows of a question become consecutive rows of the batch.

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
            return self._shift(batch)
        tokens = [key for key in ("input_ids", "token_type_ids") if key in examples[0]]
        rows: list[dict[str, Any]] = [
            {key: example[key][window] for key in tokens}
            for example in examples
            for window in range(len(example["input_ids"]))
        ]
        batch = dict(self.pad(rows))
        for key in ("start_positions", "end_positions"):
            if key in examples[0]:
                batch[key] = torch.tensor([position for example in examples for position in example[key]])
        batch["nulls"] = torch.tensor([position for example in examples for position in example["nulls"]])
        batch["windows"] = torch.tensor([len(example["input_ids"]) for example in examples])
        windows = [torch.tensor(window) for example in examples for window in example["offsets"]]
        offsets = torch.full((*batch["input_ids"].shape, 2), -1)
        for row, window in enumerate(windows):
            start = int(batch["attention_mask"][row].argmax())
            offsets[row, start : start + len(window)] = window
        batch["offsets"] = offsets
        for name, key in (("id", "ids"), ("context", "contexts"), ("answers", "answers")):
            if name in examples[0]:
                batch[key] = [example[name] for example in examples]
        batch["search"] = dict(self.search)
        return self._shift(batch)

    def _shift(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count positions from the batch's first column, which may be padding."""
        start = batch["attention_mask"].argmax(-1)
        for key in ("start_positions", "end_positions", "nulls"):
            if key in batch:
                batch[key] = batch[key] + start
        return batch


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
    """Tokenize questions with their contexts into windows; the answer of a window without it is the null token.

    The null token is the classification token or, if there is none, the window's first token. `cut` is 1 if the
    question was cut; of several windows of a question only the first counts.

    Args:
        batch: the columns of the rows.
        tokenizer: the tokenizer.
        question_column: column of the question.
        context_column: column of the context.
        answers_column: column of the answers; None: there are none.
        start_column: column of the index of the answer's first character; None: look for the answer.
        id_column: column of the question's id; None: there is none.
        doc_stride: tokens by which windows overlap.
        max_question_length: maximum number of tokens of a question.
        max_length: maximum number of tokens of a window.
        grouped: make one example of all windows of a question, instead of one of each.
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
    for window, offsets in enumerate(encoded["offset_mapping"]):
        sides = encoded.sequence_ids(window)
        flat["offsets"].append([span if side == 1 else _OUTSIDE for span, side in zip(offsets, sides, strict=True)])
        ids = flat["input_ids"][window]
        flat["nulls"].append(ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0)
    answers: list[list[tuple[str, int]]] = []
    if answers_column is not None:
        starts = batch[start_column] if start_column else [None] * len(questions)
        cells = zip(batch[answers_column], starts, contexts, strict=True)
        answers = [parse_answers(answer, start, context) for answer, start, context in cells]
        spans = [
            _answer_tokens(flat["offsets"][window], answers[owner], flat["nulls"][window])
            for window, owner in enumerate(owners)
        ]
        flat["start_positions"], flat["end_positions"] = [first for first, _ in spans], [last for _, last in spans]
    if not grouped:
        flat["cut"] = [
            int(cuts[owner] and owners[window - 1 : window] != [owner]) for window, owner in enumerate(owners)
        ]
        return {key: value for key, value in flat.items() if key not in ("offsets", "nulls")}
    out: dict[str, list[Any]] = {key: [[] for _ in questions] for key in flat}
    for window, owner in enumerate(owners):
        for key, values in flat.items():
            out[key][owner].append(values[window])
    out["context"], out["cut"] = contexts, [int(cut) for cut in cuts]
    if id_column is not None:
        out["id"] = [str(name) for name in batch[id_column]]
    if answers:
        out["answers"] = [[text for text, _ in row] for row in answers]
    return out


def _cut_questions(questions: list[str], tokenizer: Any, max_length: int) -> tuple[list[str], list[bool]]:
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    cuts = [len(spans) > max_length for spans in offsets]
    kept = [
        question[: spans[max_length - 1][1]] if cut else question
        for question, spans, cut in zip(questions, offsets, cuts, strict=True)
    ]
    return kept, cuts


def _answer_tokens(offsets: list[tuple[int, int]], answers: list[tuple[str, int]], null: int) -> tuple[int, int]:
    """Return the first and last token of the first answer, or twice the null token if the window lacks a part of it."""
    if not answers:
        return null, null
    text, start = answers[0]
    end = start + len(text)
    inside = [
        token
        for token, (first, last) in enumerate(offsets)
        if first >= 0 and last > start and first < end and last > first
    ]
    context = [span for span in offsets if span[0] >= 0]
    if not inside or not context or context[0][0] > start or context[-1][1] < end:
        return null, null
    return inside[0], inside[-1]
