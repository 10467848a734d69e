"""Plain torch layers: no Lightning, no transformers."""

from lit_peft.nn.lora import LoRAEmbedding, LoRALayer, LoRALinear

__all__ = ["LoRAEmbedding", "LoRALayer", "LoRALinear"]
