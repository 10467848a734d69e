"""LoRA on parameters that hold the weights of all experts of a mixture: one A and B for each expert."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.nn.grouped import LowRankSum
from lit_peft.nn.lora_layer import InitLoRA, LoRALayer, check
from lit_peft.nn.quantized_experts import QuantizedWeight, expert_weight
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError

_LOCK = threading.Lock()


class ExpertLoRA(LoRALayer):
    """A and B for each matrix of a stacked parameter, `W_e + s · B_e A_e` (2106.09685, for each expert e).

    The layer computes nothing itself: `LoRAExperts` lets the code of the experts see the sum in the place of W.

    A has the shape (experts, r, in_features) and B has (experts, out_features, r), as peft counts inputs and outputs:
    W has the shape (experts, out_features, in_features), or (experts, in_features, out_features) where the module says
    `is_transposed`. A single matrix counts as one expert, and A and B lack the first dimension.

    Args:
        experts: the module with the parameter; it is kept, not copied, and its parameters are frozen.
        parameter_name: the parameter's name in `experts`.
        r: rank of each update.
        lora_alpha: the updates are scaled by `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`).
        use_rslora: rank-stabilized scale (arXiv:2312.03732).
        init_lora_weights: `kaiming` or `gaussian`, see `LoRALayer`.

    Raises:
        LitPeftError: a setting is out of range, or the initialization would change W.
    """

    def __init__(
        self,
        experts: nn.Module,
        parameter_name: str,
        r: int = 8,
        lora_alpha: float = 16,
        use_rslora: bool = False,
        init_lora_weights: InitLoRA = "kaiming",
    ) -> None:
        self.parameter_name = parameter_name
        *stack, rows, columns = expert_weight(experts, parameter_name).shape
        self.stack = tuple(stack)
        # Rows are inputs. Only for stacked weights, as in peft.
        self.is_transposed = bool(stack) and bool(getattr(experts, "is_transposed", False))
        d_in, d_out = (rows, columns) if self.is_transposed else (columns, rows)
        settings = {"use_rslora": use_rslora, "init_lora_weights": init_lora_weights}
        super().__init__(experts, d_in, d_out, r, lora_alpha, **settings)  # type: ignore[arg-type]

    def keep_base(self, base_layer: nn.Module) -> None:
        # Not registered as a submodule: several layers share it, and `LoRAExperts` has it.
        object.__setattr__(self, "base_layer", base_layer.requires_grad_(False))

    def reset_parameters(self, init_lora_weights: InitLoRA) -> None:
        check(init_lora_weights=init_lora_weights)
        if init_lora_weights not in ("kaiming", "gaussian"):
            raise LitPeftError(
                f"init_lora_weights={init_lora_weights!r} is defined for linear layers only, not for "
                f"{self.parameter_name!r}, which target_parameters selects: use init_lora_weights='kaiming'."
            )
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            # As for the A of a linear layer: only the inputs count, not the experts.
            nn.init.kaiming_uniform_(self.lora_A.data.flatten(end_dim=-2), a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self) -> Tensor:
        found: Tensor = expert_weight(self.base_layer, self.parameter_name)
        return found

    def dense_weight(self) -> Tensor:
        weight: Any = self.weight
        return weight.matrices() if isinstance(weight, QuantizedWeight) else weight.detach()

    def merge(self, check: bool = True) -> None:
        """As `WeightUpdate.merge`, which cannot be undone for quantized experts.

        Raises:
            LitPeftError: the experts are quantized.
        """
        refuse_quantized(self)
        super().merge(check)

    @property
    def bias(self) -> Tensor | None:
        return None

    @property
    def target(self) -> str:
        """What is adapted, by its name in the module that has the parameter."""
        return self.parameter_name

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return L and R with `W + s · L R` for W as it is stored."""
        return (self.lora_A.mT, self.lora_B.mT) if self.is_transposed else (self.lora_B, self.lora_A)

    def delta_weight(self) -> Tensor:
        """Return s · B A for each expert, in the shape of the parameter."""
        left, right = self.factors()
        return left @ right * self.scaling

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, experts={math.prod(self.stack)}"


def refuse_quantized(layer: Any) -> None:
    """Refuse to merge the update of quantized experts so that it can be undone.

    Raises:
        LitPeftError: the experts are quantized.
    """
    if isinstance(layer.weight, QuantizedWeight):
        raise LitPeftError(
            f"{layer.parameter_name} of these experts is quantized, so an update cannot be added to it and removed "
            "again: use lit_peft.merge(model), which dequantizes the model for good."
        )


class LoRAExperts(nn.Module):
    """The experts of a mixture, with a LoRA for some of their parameters.

    The experts compute as they did: with the model's routing, its activation, and the implementation that
    transformers chose for them (`experts_implementation`). During their forward, an attribute hides each adapted
    parameter. It multiplies as `W + s · B A` would, without building the sum (see `LowRankSum`).

    Args:
        base_layer: the experts.
        layers: the LoRA of each adapted parameter, or a sum of several, by the parameter's name.
    """

    def __init__(self, base_layer: nn.Module, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.running = 0
        for name, layer in layers.items():
            self.add_module(f"lora_{name}", layer)

    @property
    def layers(self) -> dict[str, Any]:
        """The LoRA of each adapted parameter, or a sum of several, by the parameter's name."""
        found: dict[str, Any] = {}
        for module in self.children():
            if isinstance(module, WeightUpdate):
                found[str(module.parameter_name)] = module
        return found

    # The compiler cannot follow weights that are no tensors.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Hidden as long as any thread is in here; otherwise FSDP2 needs to find the parameters.
        attributes = vars(self.base_layer)
        with _LOCK:
            self.running += 1
            attributes.update({name: _Seen(layer) for name, layer in self.layers.items()})
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            with _LOCK:
                self.running -= 1
                if not self.running:
                    for name in self.layers:
                        attributes.pop(name, None)

    def restore_base(self) -> nn.Module:
        """Return the experts as they were before they were adapted, bit for bit."""
        for layer in self.layers.values():
            layer.restore_base()
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        # Models read the attributes of their experts, and DBRX also their weights.
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.layers.get(name)
            return getattr(super().__getattr__("base_layer"), name) if layer is None else _Seen(layer)


class _Seen:
    """What the code of the experts finds in the place of an adapted parameter: the sum as it is at that moment."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def now(self) -> Tensor | LowRankSum:
        layer = self.layer
        if layer.merged:
            weight: Tensor = layer.weight
            return weight
        left, right = layer.factors()
        return LowRankSum(layer.weight, left, right, layer.scaling)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "layer" not in vars(self):
            raise AttributeError(name)
        return getattr(self.now(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.now()[index]

    def __len__(self) -> int:
        return len(self.layer.weight)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args = tuple(_now(value) for value in args)
        return func(*args, **{name: _now(value) for name, value in (kwargs or {}).items()})


def _now(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_now(inner) for inner in value)
    return value.now() if isinstance(value, _Seen) else value
