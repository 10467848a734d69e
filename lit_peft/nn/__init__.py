"""Plain torch layers: no Lightning, no transformers."""

from lit_peft.nn.bottleneck import Bottleneck, SublayerAdapter
from lit_peft.nn.lora import LoRAEmbedding, LoRALayer, LoRALinear
from lit_peft.nn.lora_conv import LoRAConv
from lit_peft.nn.prefix import Prefix

__all__ = ["Bottleneck", "LoRAConv", "LoRAEmbedding", "LoRALayer", "LoRALinear", "Prefix", "SublayerAdapter"]
