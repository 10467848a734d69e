"""Preferences as tokens: each answer with its prompt, cut alike; and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_peft.data.chat_rendering import ChatRenderer
from lit_peft.data.chats import add_rendered, chat_problem, template_arguments, without_nulls
from lit_peft.data.collate import IGNORE, PadCollator
from lit_peft.data.packing import packed_layout
from lit_peft.data.preference_forms import (
    PreferenceForm,
    SkippedRowError,
    check_answers,
    plain_prompt,
    read_label,
    read_preference,
    write_dialogue,
)
from lit_peft.data.prompt_templates import fill_template
from lit_peft.data.rows import RowError
from lit_peft.data.supervised import end_of_text, strip_end_tokens
from lit_peft.util.errors import first_line

if TYPE_CHECKING:
    from datasets import Dataset

Tokens = list[int]
# More tokens than any text has.
_NO_LIMIT = 2**30


def rows_of(batch: dict[str, list[Any]], filled_columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch, without the nulls that fill the objects of some columns."""
    for row in range(len(next(iter(batch.values())))):
        yield {
            name: without_nulls(values[row]) if name in filled_columns else values[row]
            for name, values in batch.items()
        }


def without_input(form: PreferenceForm, style: str) -> tuple[PreferenceForm, str | None]:
    """Return a form without the column of an instruction's input, for which plain text has a place, and that column."""
    if style == "chat" or form.prompt is None:
        return form, None
    return replace(form, prompt=replace(form.prompt, input=None)), form.prompt.input


def encode_preferences(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    form: PreferenceForm,
    style: str,
    template_columns: Sequence[str],
    filled_columns: Sequence[str],
    max_length: int,
    truncation_side: str,
    is_encoder_decoder: bool,
    needs_all: bool,
) -> dict[str, list[Any]]:
    """Tokenize prompts with their answers.

    Args:
        batch: the columns of the rows.
        tokenizer: the tokenizer.
        form: how the rows are written.
        style: `chat`, for the tokenizer's chat template; or a template of `fill_template`.
        template_columns: the columns that the chat template gets, of those that the table has.
        filled_columns: the columns whose objects were given the members of all rows, filled with nulls.
        max_length: maximum number of tokens of a prompt with its answer; of an encoder-decoder, of each.
        truncation_side: which end of longer ones is cut: `right`, the end of each answer; `left`, the start of the
            prompt, by the same number of tokens for all answers of a row.
        is_encoder_decoder: prompts and answers are apart.
        needs_all: no row may be left out.

    Returns:
        Lists with an entry for each answer of a row: `input_ids`, `labels` (-100 on the prompt), `length` before
        cutting, `supervised` (number of the answer's tokens) and `lost` (number of those that were cut); `desirable`,
        the label of a single answer; and `left_out`, why a row is not used, "" if it is.

    Raises:
        RowError: a row cannot be read or rendered, or must be left out and may not be.
    """
    renderer = ChatRenderer(tokenizer) if style == "chat" else None
    form, input_column = without_input(form, style)
    out: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "length", "supervised", "lost", "desirable", "left_out")
    }
    for row, cells in enumerate(rows_of(batch, filled_columns)):
        left_out = ""
        texts: list[tuple[Tokens, Tokens]] = [([], [])] * max(len(form.answers), 1)
        try:
            label = None if form.label is None else read_label(cells[form.label], form.label)
            prompt, answers = read_preference(cells, form)
            if form.prompt is None:
                check_answers(answers)
            for answer in answers:
                if problem := chat_problem([*prompt, *answer], needs_answer=True):
                    raise ValueError(problem)
            if renderer is not None:
                extra = template_arguments({name: cells[name] for name in template_columns}, row)
                texts = [_rendered(renderer, prompt, answer, extra) for answer in answers]
            else:
                asked = prompt_text(prompt, style, cells.get(input_column or ""))
                texts = _filled(tokenizer, asked, answers, style, is_encoder_decoder)
            if len(texts) == 2 and texts[0] == texts[1] and not needs_all:
                raise SkippedRowError("whose answers are the same")
        except SkippedRowError as problem:
            if needs_all:
                raise RowError(row, f"a row {problem} cannot be compared; remove it.") from problem
            left_out, label = str(problem), None if form.label is None else False
        except ValueError as problem:
            raise RowError(row, f"{problem}.") from problem
        cut = _cut_source if is_encoder_decoder else _cut
        found = cut(texts, max_length, truncation_side)
        for name in ("input_ids", "labels", "length", "supervised", "lost"):
            out[name].append([answer[name] for answer in found])
        empty = not left_out and any(answer["lost"] == answer["supervised"] for answer in found)
        if empty and needs_all:
            raise RowError(row, f"data.max_length {max_length} leaves nothing of an answer; raise it.")
        out["left_out"].append("length" if empty else left_out)
        out["desirable"].append(label)
    return out


def _rendered(
    renderer: ChatRenderer, prompt: list[Any], answer: list[Any], extra: dict[str, Any]
) -> tuple[Tokens, Tokens]:
    """Return the tokens of a chat, and its labels.

    Raises:
        ValueError: the template cannot render it.
    """
    out: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "length", "supervised", "lost", "kept")}
    learned = [len(prompt) + index for index, message in enumerate(answer) if message["role"] == "assistant"]
    try:
        parts = renderer.examples(renderer.clean([*prompt, *answer]), learned, **extra)
    except Exception as problem:  # jinja's errors, and those of what the template computes
        raise ValueError(
            f"the chat template cannot render this chat ({type(problem).__name__}: {first_line(problem)}); correct the "
            "row, or set data.chat_template"
        ) from problem
    if len(parts) > 1:
        raise ValueError(
            "the chat template renders the turns of an answer differently when later ones follow, so they are not "
            "one text; set data.chat_template to one that only appends"
        )
    add_rendered(out, renderer.tokenizer, parts[0].text, parts[0].spans, _NO_LIMIT)
    return out["input_ids"][0], out["labels"][0]


def prompt_text(prompt: list[Any], style: str, input_cell: Any = None) -> str:
    """Return a prompt as text, up to where the answer starts.

    Args:
        prompt: its messages.
        style: `dialogue`, or a template of `fill_template`.
        input_cell: the input of an instruction.

    Raises:
        ValueError: only a chat template can render the messages.
    """
    if style == "dialogue":
        return f"{write_dialogue(prompt)}\n\nAssistant:"
    question, system, history = plain_prompt(prompt)
    return fill_template(question, "" if input_cell is None else str(input_cell), style, system, history)


def answer_text(answer: list[Any]) -> str:
    """Return an answer of one turn as text.

    Raises:
        ValueError: only a chat template can render it.
    """
    if len(answer) > 1 or not isinstance(answer[0].get("content"), str):
        raise ValueError("an answer of several turns needs a chat template; set data.chat_template")
    return str(answer[0]["content"])


def _filled(
    tokenizer: Any, text: str, answers: list[list[Any]], style: str, apart: bool
) -> list[tuple[Tokens, Tokens]]:
    """Return the tokens of a prompt in plain text with each answer, and their labels."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    found = []
    for answer in answers:
        reply = answer_text(answer) if style == "plain" else answer_text(answer).lstrip()
        reply = f" {reply}" if style == "dialogue" else reply
        if apart:
            tail = strip_end_tokens(tokenizer(text_target=reply, verbose=False)["input_ids"], tokenizer)
            found.append((ids, tail + end_of_text(tokenizer)))
            continue
        head = strip_end_tokens(ids, tokenizer)
        tail = list(tokenizer(reply, add_special_tokens=False, verbose=False)["input_ids"]) + end_of_text(tokenizer)
        found.append((head + tail, [IGNORE] * len(head) + tail))
    return found


def _cut(texts: list[tuple[Tokens, Tokens]], limit: int, side: str) -> list[dict[str, Any]]:
    """Cut the texts of a row to a number of tokens, and count what was lost."""
    lengths = [len(ids) for ids, _ in texts]
    start = 0
    if side == "left" and max(lengths) > limit:
        # Of each prompt the same part is left, and at least one token of it.
        prompt = min(next((i for i, label in enumerate(labels) if label != IGNORE), 0) for _, labels in texts)
        start = min(max(lengths) - limit, max(prompt - 1, 0))
    found = []
    for ids, labels in texts:
        supervised = sum(label != IGNORE for label in labels[1:])
        kept_ids, kept = ids[start : start + limit], labels[start : start + limit]
        left = sum(label != IGNORE for label in kept[1:])
        counts = {"length": len(ids), "supervised": supervised, "lost": supervised - left}
        found.append({"input_ids": kept_ids, "labels": kept, **counts})
    return found


def _cut_source(texts: list[tuple[Tokens, Tokens]], limit: int, side: str) -> list[dict[str, Any]]:
    """As `_cut`, for an encoder-decoder: the source and each answer are cut apart, and keep their end token."""
    found = []
    for ids, labels in texts:
        kept = labels if len(labels) <= limit else [*labels[: limit - 1], labels[-1]]
        source = ids if len(ids) <= limit else ids[-limit:] if side == "left" else [*ids[: limit - 1], ids[-1]]
        counts = {"length": len(ids), "supervised": len(labels), "lost": len(labels) - len(kept)}
        found.append({"input_ids": source, "labels": kept, **counts})
    return found


def split_answers(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Make a row of each answer: the chosen ones with the label True, or the single ones with their own label."""
    out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "desirable": []}
    for ids, labels, label in zip(batch["input_ids"], batch["labels"], batch["desirable"], strict=True):
        for place, (text, learned) in enumerate(zip(ids, labels, strict=True)):
            out["input_ids"].append(text)
            out["labels"].append(learned)
            out["desirable"].append(place == 0 if label is None else label)
    return out


def add_mismatched(
    batch: dict[str, list[Any]], indices: list[int], *, table: Dataset, is_encoder_decoder: bool
) -> dict[str, list[Any]]:
    """Add to each row its prompt with the answer to another one, for KTO's estimate of the divergence.

    The other row is half of the table away, so that it rarely has the same prompt.
    """
    far = len(table) // 2
    others = table[[(index + far) % len(table) for index in indices]]
    ids, labels = [], []
    for own, own_labels, other in zip(batch["input_ids"], batch["labels"], others["labels"], strict=True):
        answer = [label for label in other if label != IGNORE]
        if is_encoder_decoder:
            ids.append(own)
            labels.append(answer)
            continue
        prompt = next(place for place, label in enumerate(own_labels) if label != IGNORE)
        ids.append([*own[:prompt], *answer])
        labels.append([*[IGNORE] * prompt, *answer])
    return {**batch, "kl_input_ids": ids, "kl_labels": labels}


@dataclass(frozen=True)
class PreferenceCollator:
    """Pads the answers of several rows to one batch: of pairs, first the chosen answers, then the rejected ones.

    Attributes:
        pad: pads tokens.
        limit: maximum number of tokens of a prompt with the answer to another one.
        is_encoder_decoder: labels have a length of their own.
        packs: add how the model can run on the answers joined to rows of `limit` tokens, see `packed_layout`.
    """

    pad: PadCollator
    limit: int
    is_encoder_decoder: bool = False
    packs: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        first = examples[0]
        if isinstance(first["input_ids"][0], (list, tuple)):
            answers = range(len(first["input_ids"]))
            rows = [
                {"input_ids": example["input_ids"][answer], "labels": example["labels"][answer]}
                for answer in answers
                for example in examples
            ]
            return self._padded(rows)
        batch = self._padded(examples)
        batch["desirable"] = torch.tensor([bool(example["desirable"]) for example in examples])
        others = [
            {name: example[f"kl_{name}"][: self.limit] for name in ("input_ids", "labels")} for example in examples
        ]
        return {**batch, **{f"kl_{name}": value for name, value in self._padded(others).items()}}

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = self.pad([{"input_ids": row["input_ids"]} for row in rows])
        labels = [torch.tensor(row["labels"]) for row in rows]
        if self.is_encoder_decoder:
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        else:
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
            for row, values in enumerate(labels):
                batch["labels"][row][batch["attention_mask"][row].bool()] = values
        if self.packs:
            batch.update(packed_layout(batch["attention_mask"], self.limit, self.pad.pad_to_multiple_of))
        batch["key"] = torch.tensor([row_key(row["input_ids"], row["labels"]) for row in rows])
        return batch


def row_key(ids: Sequence[int], labels: Sequence[int]) -> int:
    """Return a number that stands for a row's tokens and labels."""
    content = np.asarray([len(ids), *ids, *labels], dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
