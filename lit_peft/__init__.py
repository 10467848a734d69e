"""Parameter-efficient fine-tuning of language models as PyTorch Lightning modules."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "BaseLM": "lit_peft.base",
    "CausalLMData": "lit_peft.data.causal_lm",
    "FullFineTuning": "lit_peft.modules",
    "HeadOnly": "lit_peft.modules",
    "LitPeftError": "lit_peft.errors",
    "LoRA": "lit_peft.modules",
    "LoRASettings": "lit_peft.methods.lora",
    "TextClassificationData": "lit_peft.data.text_classification",
    "attach": "lit_peft.methods.attachment",
    "detach": "lit_peft.methods.attachment",
    "load_adapter": "lit_peft.formats.peft",
    "merge": "lit_peft.methods.lora",
    "save_adapter": "lit_peft.formats.peft",
    "trainable_parameters": "lit_peft.methods.attachment",
}
__all__ = list(_NAMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'lit_peft' has no attribute {name!r}")
