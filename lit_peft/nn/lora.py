"""LoRA on linear layers and embeddings (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.autocast import autocast_dtype
from lit_peft.nn.cast_once import CastOnce
from lit_peft.nn.linear import linear_features, stores_transposed
from lit_peft.nn.lora_function import lora_linear
from lit_peft.nn.lora_layer import InitLoRA, LoRALayer, check
from lit_peft.nn.quantized import QuantizedLinear, check_dequantizable, dense_weight, is_quantized
from lit_peft.nn.torch_internals import function_transforms_are_active, has_forward_hooks
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError

__all__ = ["InitLoRA", "LoRAEmbedding", "LoRALayer", "LoRALinear", "check", "check_mergeable"]


def check_mergeable(model: nn.Module) -> None:
    """Check that all LoRA layers of a model can be merged, before any weight changes.

    Raises:
        LitPeftError: a weight is stored in a way that cannot be dequantized, the update, its base weight or their sum
            has NaN or infinite numbers, or the kind of layer cannot be merged.
    """
    for module in model.modules():
        if is_quantized(module):
            check_dequantizable(module)
    for module in model.modules():
        if isinstance(module, WeightUpdate):
            module.check_mergeable()


class LoRALinear(LoRALayer):
    """`h = W x + b + s · B A dropout(x)`, for any layer that multiplies by a weight (2106.09685, equation 3).

    The layer may be `nn.Linear`, a quantized form of it, or store W transposed (transformers' `Conv1D`).
    With `use_dora`, `h = m / ||W + s·BA|| · (W x + s · B A x) + b`.

    Args:
        base_layer: the layer to adapt.
        fan_in_fan_out: whether W has the shape (in_features, out_features); taken from the layer's type when None.
        **settings: see `LoRALayer`.

    Shapes:
        input (..., in_features) → output (..., out_features)
    """

    def __init__(self, base_layer: nn.Module, *, fan_in_fan_out: bool | None = None, **settings: object) -> None:
        if fan_in_fan_out is None:
            fan_in_fan_out = stores_transposed(base_layer)
        self.fan_in_fan_out = fan_in_fan_out
        d_in, d_out = linear_features(base_layer, fan_in_fan_out)
        super().__init__(base_layer, d_in, d_out, **settings)  # type: ignore[arg-type]
        self._cast = CastOnce()

    def train(self, mode: bool = True) -> LoRALinear:
        self._cast = CastOnce()
        return super().train(mode)

    def dense_weight(self) -> Tensor:
        if is_quantized(self.base_layer):
            return dense_weight(self.base_layer)
        weight = self.weight.detach()
        return weight.T if self.fan_in_fan_out else weight

    def add_to_weight(self, delta: Tensor) -> None:
        super().add_to_weight(delta.T if self.fan_in_fan_out else delta)

    def split_dims(self, by_rows: bool) -> dict[str, int | None]:
        return {"lora_A": None if by_rows else 1, "lora_B": 0 if by_rows else None}

    def _is_plain(self, x: Tensor, base: nn.Module, weight: Tensor) -> bool:
        """Whether the base is a product and nothing else, so that `lora_linear` computes it and the update as one."""
        return (
            not torch.compiler.is_compiling()
            and self.unmerged_weight is None
            and (type(base) in (nn.Linear, QuantizedLinear) or stores_transposed(base))
            and type(weight) is nn.Parameter
            and not weight.requires_grad
            and (weight.dtype == x.dtype or type(base) is QuantizedLinear or autocast_dtype(x.device) is not None)
            and x.is_floating_point()
            and not has_forward_hooks(base)
            and not function_transforms_are_active()
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # Each attribute is read once: when single tokens are decoded, that is a good part of the time.
        base: Any = self.base_layer
        weight = base.weight
        if not args and not kwargs and self._is_plain(x, base, weight):
            weight = weight.T if self.fan_in_fan_out else weight
            dropout = self.lora_dropout if self.training else 0.0
            codes = (base.scale, base.zero_point) if type(base) is QuantizedLinear else ()
            if self.lora_magnitude is not None:
                return self._decomposed(x, weight, dropout, codes)
            bias = base.bias if self.lora_bias is None else self._bias_with_update(base.bias)
            a: Tensor = self.lora_A
            b: Tensor = self.lora_B
            is_decoding = not (self.training or torch.is_grad_enabled())
            if is_decoding and a.dtype != x.dtype and autocast_dtype(x.device) is None:
                a, b = self._cast(a, b, x.dtype)
            return lora_linear(x, weight, bias, a, b, self.scaling, dropout, *codes)
        out: Tensor = base(x, *args, **kwargs)
        if self.merged:
            return out
        dropped = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        update = self.update(dropped)
        if self.lora_magnitude is None:
            return out + update.to(out.dtype)
        scale = (self.lora_magnitude / self._weight_norm()).to(out.dtype)
        bias = self.bias
        product = out if bias is None else out - bias
        if self.training and self.lora_dropout:
            # DoRA's magnitude scales W times the dropped input; the base's own output is not dropped.
            weight = self.dense_weight().to(x.dtype)
            return out + (scale - 1) * F.linear(dropped, weight) + scale * update
        result = scale * (product + update)
        return result if bias is None else result + bias

    def update(self, x: Tensor) -> Tensor:
        """Return what the update adds to the output: (..., in_features) → (..., out_features)."""
        # A and B are cast rather than x, because they are smaller.
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        bias = None if self.lora_bias is None else self.lora_bias.to(x.dtype) * self.scaling
        return F.linear(F.linear(x, a) * self.scaling, b, bias)

    def _bias_with_update(self, bias: Tensor | None) -> Tensor:
        assert self.lora_bias is not None
        own = self.lora_bias * self.scaling
        return own if bias is None else bias + own

    def _decomposed(self, x: Tensor, weight: Tensor, dropout: float, codes: tuple[Tensor | None, ...]) -> Tensor:
        """DoRA with one product for W and the update. With x̃ the dropped x and m' = m / ||W + s·BA||, it is
        `W (x - x̃) + b + m' · (W x̃ + s · B A x̃)`: the base's own output is not dropped.
        """
        assert self.lora_magnitude is not None
        dropped = F.dropout(x, dropout) if dropout else x
        update = lora_linear(dropped, weight, None, self.lora_A, self.lora_B, self.scaling, 0.0, *codes)
        scale = (self.lora_magnitude / self._weight_norm()).to(update.dtype)
        if dropout:
            return torch.addcmul(self.base_layer(x - dropped), update, scale)
        bias = self.bias
        return update * scale if bias is None else torch.addcmul(bias.to(update.dtype), update, scale)


class LoRAEmbedding(LoRALayer):
    """`h = W[x] + s · (B A)ᵀ[x]`: LoRA on an embedding table, as in the reference code of 2106.09685.

    A has the shape (r, num_embeddings) and starts at zero; B has the shape (embedding_dim, r) and starts normal.

    Args:
        base_layer: the embedding to adapt.
        **settings: see `LoRALayer`. Dropout has no effect, because the input is not dense.

    Shapes:
        input (...) of token ids → output (..., embedding_dim)
    """

    def __init__(self, base_layer: nn.Embedding, **settings: object) -> None:
        if settings.get("lora_bias"):
            raise LitPeftError(
                "lora_bias=True is not supported for an embedding, neither here nor in peft: leave the embeddings out "
                "of target_modules, or leave lora_bias out."
            )
        super().__init__(
            base_layer,
            base_layer.num_embeddings,
            base_layer.embedding_dim,
            **settings,  # type: ignore[arg-type]
        )
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx = base_layer.padding_idx

    def reset_parameters(self, init_lora_weights: InitLoRA) -> None:
        check(init_lora_weights=init_lora_weights)
        if init_lora_weights in ("pissa", "olora"):
            raise LitPeftError(
                f"init_lora_weights={init_lora_weights!r} is defined for linear layers only: leave the embeddings out "
                "of target_modules, or use init_lora_weights='kaiming'."
            )
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def dense_weight(self) -> Tensor:
        return self.weight.detach().T

    def add_to_weight(self, delta: Tensor) -> None:
        super().add_to_weight(delta.T)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        if self.merged:
            return out
        update = self.update(x).to(out.dtype)
        if self.lora_magnitude is None:
            return out + update
        return (self.lora_magnitude / self._weight_norm()).to(out.dtype) * (out + update)

    def update(self, x: Tensor) -> Tensor:
        """Return what the update adds to the output: (...) of token ids → (..., embedding_dim)."""
        update = F.embedding(x, self.lora_A.T) @ self.lora_B.T * self.scaling
        # Some models scale inside their embedding (Gemma's embed_scale); the update gets the same scale.
        factor = getattr(self.base_layer, "embed_scale", None)
        return update if factor is None else update * torch.as_tensor(factor, dtype=update.dtype, device=update.device)
