"""Data modules by task; names are imported lazily."""

from __future__ import annotations

from lit_peft.lazy import lazy_names

_NAMES = {
    "CausalLMData": "lit_peft.data.causal_lm",
    "LitDataModule": "lit_peft.data.base",
    "TextClassificationData": "lit_peft.data.text_classification",
}
__all__ = list(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)
