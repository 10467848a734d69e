"""Tasks: each has its auto class, head, loss and metrics. A new task is one file, and one line here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lit_peft.tasks.base import Task
from lit_peft.tasks.causal_lm import CausalLM
from lit_peft.tasks.embedding import Embedding
from lit_peft.tasks.image_text_to_text import ImageTextToText
from lit_peft.tasks.masked_lm import MaskedLM
from lit_peft.tasks.multiple_choice import MultipleChoice
from lit_peft.tasks.preference import Preference
from lit_peft.tasks.question_answering import QuestionAnswering
from lit_peft.tasks.reward import Reward
from lit_peft.tasks.seq2seq import Seq2Seq
from lit_peft.tasks.sequence_classification import SequenceClassification
from lit_peft.tasks.speech import SpeechSeq2Seq
from lit_peft.tasks.token_classification import TokenClassification
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief, check_types

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        CausalLM,
        Seq2Seq,
        SequenceClassification,
        TokenClassification,
        MultipleChoice,
        QuestionAnswering,
        Reward,
        Preference,
        Embedding,
        MaskedLM,
        ImageTextToText,
        SpeechSeq2Seq,
    )
}


def find_task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """Return a new task of this name.

    Args:
        name: its name in `TASKS`.
        settings: the arguments of its class.

    Raises:
        LitPeftError: there is no such task, or a setting is unknown or has a wrong value.
    """
    if name not in TASKS:
        raise LitPeftError(f"task={name!r} is not known: use {closest(name, TASKS, n=len(TASKS))}.")
    kind, settings = TASKS[name], dict(settings or {})
    known = list(inspect.signature(kind).parameters)
    for setting in settings:
        if setting not in known:
            fix = f"use {closest(setting, known, n=len(known))}" if known else "leave task_args out"
            raise LitPeftError(f"task_args has {brief(setting)}, which task={name!r} does not have: {fix}.")
    check_types(kind.__init__, settings, "task_args: ")
    return kind(**settings)
