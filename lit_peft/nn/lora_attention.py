"""LoRA on `nn.MultiheadAttention`, which uses the weights of its projections without calling a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.nn.lora_layer import InitLoRA
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError


class ProjectionLoRA(ExpertLoRA):
    """A and B of a projection of `nn.MultiheadAttention`: a parameter that is read without calling a layer.

    Args and shapes: see `ExpertLoRA`, whose parameter is a single matrix here.
    """

    # The path of the parameter's module, from the attention.
    owner: str = ""

    @property
    def target(self) -> str:
        return f"{self.owner}.{self.parameter_name}" if self.owner else self.parameter_name


class LoRAMultihead(nn.Module):
    """`nn.MultiheadAttention` with LoRA on the projections of its input and of its output.

    It computes with `W + s · B A` in the place of the two weights, as peft does: torch's code needs whole weights.

    Args:
        base_layer: the attention.
        layers: the updates by the names of the parameters: `in_proj_weight` and `out_proj.weight`.
    """

    def __init__(self, base_layer: nn.Module, layers: Mapping[str, WeightUpdate]) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name, layer in layers.items():
            self.add_module(f"lora_{name.split('.')[0]}", layer)

    @classmethod
    def updates(
        cls,
        attention: nn.Module,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        init_lora_weights: InitLoRA = "kaiming",
    ) -> dict[str, ProjectionLoRA]:
        """Return new updates of an attention's projections, by the names of the parameters.

        Raises:
            LitPeftError: the attention has separate weights for queries, keys and values, or a setting does not suit.
        """
        base: Any = attention
        if base.in_proj_weight is None:
            raise LitPeftError(
                f"An nn.MultiheadAttention with kdim={base.kdim} and vdim={base.vdim} has separate weights for "
                "queries, keys and values, which LoRA does not support, neither here nor in peft: leave it out of "
                "target_modules."
            )
        found = {}
        for owner, name, path in ((base, "in_proj_weight", ""), (base.out_proj, "weight", "out_proj")):
            update = ProjectionLoRA(owner, name, r, lora_alpha, use_rslora, init_lora_weights)
            update.owner = path
            found[update.target] = update
        return found

    @property
    def layers(self) -> dict[str, Any]:
        """The updates by the names of the parameters."""
        return {"in_proj_weight": self.lora_in_proj_weight, "out_proj.weight": self.lora_out_proj}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: _sum(layer) for name, layer in self.layers.items() if not layer.merged}
        return functional_call(self.base_layer, weights, args, kwargs)

    def restore_base(self) -> nn.Module:
        """Return the attention as it was before it was adapted, bit for bit."""
        for layer in self.layers.values():
            layer.restore_base()
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        # `nn.TransformerEncoderLayer` reads attributes of its attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def _sum(layer: WeightUpdate) -> Tensor:
    """W + s · B A, in W's dtype."""
    return layer.weight + layer.delta_weight().to(layer.weight.dtype)
