"""SQuAD's json as rows, and the answers of a row in the forms that files have."""

from __future__ import annotations

from typing import Any

from lit_peft.data.labels import parse_number
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief


def unfold_articles(batch: dict[str, list[Any]], names: dict[str, str]) -> dict[str, list[Any]]:
    """Make a row of each question of SQuAD's articles and paragraphs.

    Args:
        batch: the column "data" of SQuAD's json.
        names: the names to give to the columns "question", "context", "answers" and "id".
    """
    out: dict[str, list[Any]] = {name: [] for name in names.values()}
    for articles in batch["data"]:
        for article in articles if isinstance(articles, list) else [articles]:
            for paragraph in _member(article, "paragraphs", list):
                for question in _member(paragraph, "qas", list):
                    # A question marked as impossible has no answer, even if some are listed.
                    answerable = not _member(question, "is_impossible", (bool, type(None)))
                    answers = (_member(question, "answers", (list, type(None))) or []) if answerable else []
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


def _member(item: Any, key: str, expected: type | tuple[type, ...]) -> Any:
    """Return a member of an object.

    Raises:
        LitPeftError: it is missing or has another type.
    """
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(value, expected):
        raise LitPeftError(
            "A SQuAD file has articles with 'paragraphs', paragraphs with 'context' and 'qas', and qas with 'question' "
            "and 'answers', which have 'text' and 'answer_start'; this one has "
            f"{key!r} = {brief(value)} in {brief(item)}; correct it."
        )
    return value


def parse_answers(answers: Any, start: Any, context: str) -> list[tuple[str, int]]:
    """Return a row's answers with the index of their first character, -1 if the context does not contain them.

    Args:
        answers: SQuAD's `{"text": [...], "answer_start": [...]}`, a list of texts or of such objects, or one text.
        start: the index of the first character, if `answers` is one text and the index is known.
        context: the text that contains the answers.
    """
    if isinstance(answers, dict):
        texts, starts = _as_list(answers.get("text")), _as_list(answers.get("answer_start"))
    elif isinstance(answers, list):
        texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
        starts = [answer["answer_start"] for answer in answers if isinstance(answer, dict) and "answer_start" in answer]
    else:
        texts = [str(answers)] if answers is not None and str(answers).strip() else []
        starts = [] if start is None or not str(start).strip() else [start]
    if len(starts) != len(texts):
        starts = [context.find(str(text)) for text in texts]
    numbers = [parse_number(start) for start in starts]
    return [(str(text), -1 if index is None else int(index)) for text, index in zip(texts, numbers, strict=True)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
