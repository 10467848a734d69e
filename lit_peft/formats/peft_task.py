"""What peft calls the task of a model, which it writes into every folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_peft.models.transformers_internals import is_model_of

# The tasks with a head of their own -> the modules that peft takes for it, and stores.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def task_type(model: nn.Module) -> str:
    """peft's `task_type` of a transformers model, by its class."""
    top: Any = model
    found = next((task for auto_class, task in _TASKS.items() if is_model_of(auto_class, model)), None)
    if found is None and hasattr(top, "can_generate") and top.can_generate():
        found = "SEQ_2_SEQ_LM" if getattr(top.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return found or "FEATURE_EXTRACTION"
