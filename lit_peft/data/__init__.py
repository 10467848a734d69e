"""Data modules by task; names are imported lazily."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "CausalLMData": "lit_peft.data.causal_lm",
    "LitDataModule": "lit_peft.data.base",
    "TextClassificationData": "lit_peft.data.text_classification",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'lit_peft.data' has no attribute {name!r}")
