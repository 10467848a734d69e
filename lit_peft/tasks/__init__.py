"""Tasks: each has its auto class, head, loss and metrics. A new task is one file, and one line here."""

from __future__ import annotations

from lit_peft.tasks.base import Task
from lit_peft.tasks.causal_lm import CausalLM
from lit_peft.tasks.multiple_choice import MultipleChoice
from lit_peft.tasks.question_answering import QuestionAnswering
from lit_peft.tasks.seq2seq import Seq2Seq
from lit_peft.tasks.sequence_classification import SequenceClassification
from lit_peft.tasks.token_classification import TokenClassification
from lit_peft.util.errors import LitPeftError, closest

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (CausalLM, Seq2Seq, SequenceClassification, TokenClassification, MultipleChoice, QuestionAnswering)
}


def find_task(name: str) -> Task:
    """Return a new task of this name.

    Raises:
        LitPeftError: there is no such task.
    """
    if name not in TASKS:
        raise LitPeftError(f"task={name!r} is not known: use {closest(name, TASKS, n=len(TASKS))}.")
    return TASKS[name]()
