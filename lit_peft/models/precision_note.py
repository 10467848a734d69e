"""What of a quantized model is quantized, and what stayed in full precision, in words."""

from __future__ import annotations

import math
from collections import Counter

from torch import nn

from lit_peft.nn.linear import linear_features
from lit_peft.nn.quantized import is_quantized
from lit_peft.nn.quantized_experts import QuantizedStack

# Groups of layers that are named; the others are summed up.
_NAMED = 4


def precision_note(model: nn.Module) -> str | None:
    """Return how much of the frozen weights is quantized, and which layers are not; None if none is quantized."""
    quantized, kept = 0, Counter[str]()
    for path, module in model.named_modules():
        if is_quantized(module):
            quantized += module.numel() if isinstance(module, QuantizedStack) else math.prod(linear_features(module))
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and not parameter.requires_grad:
                    kept[path.removesuffix(".base_layer").rpartition(".")[2]] += parameter.numel()
    if not quantized:
        return None
    total = quantized + sum(kept.values())
    named = [f"{name} ({count / total:.2%})" for name, count in kept.most_common(_NAMED)]
    if len(kept) > _NAMED:
        rest = sum(kept.values()) - sum(count for _, count in kept.most_common(_NAMED))
        named.append(f"others ({rest / total:.2%})")
    return f"{quantized / total:.2%} of {total:,} frozen weights; in full precision: {', '.join(named) or 'none'}"
