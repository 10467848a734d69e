"""Prompts in Alpaca's form, and chat templates in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_peft.models.sources import PACKAGE_PREFIX, resolve_packaged_file
from lit_peft.util.errors import LitPeftError, first_line

_OPENING = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."
# What LLM-Adapters' prompts contain by mistake: the indentation of their source code, and a comment of it.
_INDENT = " " * 16
_COMMENT = "  # noqa: E501"

TEMPLATES = ("alpaca", "llm_adapters", "plain")


def fill_template(
    instruction: str,
    input_text: str = "",
    template: str = "alpaca",
    system: str = "",
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the prompt for an instruction, up to where the answer starts.

    Args:
        instruction: what to do.
        input_text: what to do it with; "" for none.
        template: `alpaca`, or `llm_adapters`: the prompt of LLM-Adapters' `evaluate.py`, with the 16 spaces and the
            comment of its source code in it, for adapters that were trained there; or `plain`: the texts alone.
        system: replaces the first sentences of Alpaca's prompt; "": keep them.
        history: earlier instructions with their answers; not for `llm_adapters`.
    """
    if template == "plain":
        before = [text for pair in history for text in pair]
        return "\n\n".join(part for part in (system, *before, instruction, input_text) if part)
    opening = system or f"{_OPENING}{_INPUT if input_text else ''}{_REQUEST}"
    turns = [f"### Instruction:\n{asked}\n\n### Response:\n{answer}" for asked, answer in history]
    parts = [opening, *turns, f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{input_text}"] if input_text else []
    parts += ["### Response:\n"]
    if template == "alpaca":
        return "\n\n".join(parts)
    parts = [part.replace(":\n", f":\n{_INDENT}", 1) for part in parts]
    return f"{parts[0]}{_COMMENT}\n\n{_INDENT}" + f"\n{_INDENT}\n{_INDENT}".join(parts[1:])


def parse_history(cell: Any) -> list[tuple[str, str]]:
    """Return a row's earlier instructions with their answers; the cell may be JSON text.

    Raises:
        ValueError: the cell is not a list of pairs of texts.
    """
    if isinstance(cell, str) and cell.strip():
        cell = json.loads(cell)
    if not cell:
        return []
    is_list = isinstance(cell, list)
    if not is_list or not all(isinstance(pair, list) and len(pair) == 2 and None not in pair for pair in cell):
        raise ValueError("it is not a list of [instruction, answer] pairs")
    return [(str(asked), str(answer)) for asked, answer in cell]


def read_template(value: str) -> str:
    """Return a chat template, given as itself or as the path of its file, which may be in an installed package.

    Raises:
        LitPeftError: it is neither, or the file cannot be read.
    """
    if "{" in value:
        return value
    try:
        if value.startswith(PACKAGE_PREFIX):
            return resolve_packaged_file(value, "data.chat_template").read_text("utf-8")
        return Path(value).expanduser().read_text("utf-8")
    except LitPeftError:
        raise
    except (OSError, ValueError) as problem:
        raise LitPeftError(
            f"data.chat_template {value!r} is neither a template nor a readable file ({first_line(problem)}); give "
            "one of them."
        ) from problem
