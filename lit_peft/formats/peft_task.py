"""The `task_type` that peft writes into every folder, and the heads that it saves for each task."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_peft.models.transformers_internals import is_model_of

# The ends of the names of the modules that peft takes for the task's head and saves.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_AUTO_CLASSES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def task_type(model: nn.Module) -> str:
    """Return peft's `task_type` for a transformers model."""
    top: Any = model
    found = next((task for auto_class, task in _AUTO_CLASSES.items() if is_model_of(auto_class, model)), None)
    if found is None and hasattr(top, "can_generate") and top.can_generate():
        found = "SEQ_2_SEQ_LM" if getattr(top.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return found or "FEATURE_EXTRACTION"
