"""Several LoRAs that are active at the same time: their updates are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.expert_lora import ExpertLoRA, refuse_quantized
from lit_peft.nn.lora import LoRALinear
from lit_peft.nn.lora_layer import LoRALayer
from lit_peft.nn.weight_update import WeightUpdate


class LoRASum(WeightUpdate):
    """`h = W x + b + Σ s_i · B_i A_i dropout_i(x)` for the LoRA layers of several adapters of one frozen layer.

    Linear layers compute one product with all A, and one with all B, beside that with W. Each A and B keeps its
    gradient.

    Args:
        layers: LoRA layers of the same frozen layer, none of them merged. They share it with this module until
            `restore_base` is called.

    Shapes:
        those of the layers
    """

    def __init__(self, layers: Sequence[LoRALayer]) -> None:
        super().__init__()
        first = layers[0]
        self.in_features, self.out_features = first.in_features, first.out_features
        self.keep_base(first.base_layer)
        for layer in layers:
            layer.lend_base()
        self.layers = nn.ModuleList(layers)

    def parts(self) -> list[LoRALayer]:
        """Return the LoRA layers."""
        return [layer for layer in self.layers if isinstance(layer, LoRALayer)]

    def replace_base(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        for layer in self.parts():
            layer.take_base(base_layer)
            layer.lend_base()

    def dense_weight(self) -> Tensor:
        return self.parts()[0].dense_weight()

    def add_to_weight(self, delta: Tensor) -> None:
        self.parts()[0].add_to_weight(delta)

    def delta_weight(self) -> Tensor:
        return torch.stack([layer.delta_weight() for layer in self.parts()]).sum(0)

    def delta_bias(self) -> Tensor | None:
        found = [delta for layer in self.parts() if (delta := layer.delta_bias()) is not None]
        return torch.stack(found).sum(0) if found else None

    def own_parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.parts() for parameter in layer.own_parameters()]

    def check_kind(self) -> None:
        for layer in self.parts():
            layer.check_kind()

    def restore_base(self) -> nn.Module:
        self.unmerge()
        for layer in self.parts():
            layer.take_base(self.base_layer)
        return self.base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return out
        layers = self.parts()
        # Token ids, an embedding's input, are not dropped.
        drops = self.training and x.is_floating_point() and any(layer.lora_dropout for layer in layers)
        if drops or not all(type(layer) is LoRALinear and layer.lora_bias is None for layer in layers):
            for layer in layers:
                dropped = F.dropout(x, layer.lora_dropout, self.training) if drops and layer.lora_dropout else x
                out = out + layer.update(dropped).to(out.dtype)
            return out
        a = torch.cat([layer.lora_A for layer in layers]).to(x.dtype)
        b = torch.cat([layer.lora_B * layer.scaling for layer in layers], 1).to(x.dtype)
        return out + F.linear(F.linear(x, a), b).to(out.dtype)


class ParameterLoRASum(WeightUpdate):
    """The sum of the updates of several `ExpertLoRA` of one parameter, `W + Σ s_i · B_i A_i`.

    Args:
        layers: the updates of the same parameter, none of them merged.
    """

    scaling = 1.0

    def __init__(self, layers: Sequence[ExpertLoRA]) -> None:
        super().__init__()
        first = layers[0]
        self.in_features, self.out_features, self.parameter_name = first.in_features, first.out_features, first.target
        object.__setattr__(self, "base_layer", first.base_layer)
        self.layers = nn.ModuleList(layers)

    def parts(self) -> list[ExpertLoRA]:
        """Return the updates."""
        return [layer for layer in self.layers if isinstance(layer, ExpertLoRA)]

    @property
    def weight(self) -> Tensor:
        return self.parts()[0].weight

    @property
    def bias(self) -> Tensor | None:
        return None

    def dense_weight(self) -> Tensor:
        return self.parts()[0].dense_weight()

    def merge(self, check: bool = True) -> None:
        """As `WeightUpdate.merge`, which cannot be undone for quantized experts.

        Raises:
            LitPeftError: the experts are quantized.
        """
        refuse_quantized(self)
        super().merge(check)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return L and R with `W + L R` for W as it is stored; see `ExpertLoRA.factors`."""
        lefts, rights = zip(*(layer.factors() for layer in self.parts()), strict=True)
        scaled = [left * layer.scaling for left, layer in zip(lefts, self.parts(), strict=True)]
        return torch.cat(scaled, -1), torch.cat(rights, -2)

    def delta_weight(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def own_parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.parts() for parameter in layer.own_parameters()]
