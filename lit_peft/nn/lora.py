"""LoRA layers: a frozen layer W plus a trained low-rank update (Hu et al. 2021, arXiv:2106.09685).

x ──────────┬───────────────────────┐
            │                       │
      ┌─────▼─────┐           ┌─────▼─────┐
      │ W, frozen │           │ A: d_in→r │
      └─────┬─────┘           └─────┬─────┘
            │                 ┌─────▼─────┐
            │                 │ B: r→d_out│ · s      s = alpha / r
            │                 └─────┬─────┘
            └──────────(+)──────────┘
                        │
            h = W x + s · B A x
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.autocast import autocast_dtype
from lit_peft.nn.linear import adapter_dtype, linear_features, stores_transposed
from lit_peft.nn.lora_function import lora_linear
from lit_peft.nn.quantized import QuantizedLinear, dense_weight, is_quantized
from lit_peft.util.errors import LitPeftError, closest

# Whether a linear layer and its update are computed as one operation where they can be; False: the plain formula.
FUSED = True

InitLoRA = Literal["kaiming", "gaussian", "pissa", "olora"]


class LoRALayer(nn.Module):
    """What the LoRA layers share: the frozen `base_layer`, A, B, the scale, merging.

    Args:
        base_layer: the layer to adapt; it is kept, not copied, and its parameters are frozen.
        in_features: d_in, the width of the update's input.
        out_features: d_out, the width of the update's output.
        r: rank of the update.
        lora_alpha: the update is scaled by `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`).
        lora_dropout: dropout probability on the update's input.
        use_rslora: rank-stabilized scale (arXiv:2312.03732).
        use_dora: weight-decomposed update (arXiv:2402.09353): one trained magnitude per output feature.
        init_lora_weights: how A and B start: `kaiming` (A Kaiming-uniform, B zero: the identity), `gaussian`
            (A normal with standard deviation 1/r, B zero), `pissa` (principal singular vectors, arXiv:2404.02948)
            or `olora` (QR, arXiv:2406.01775). The last two move part of W into the update.

    Raises:
        LitPeftError: as `check`; or W, quantized or too small, has no such start.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: InitLoRA = "kaiming",
    ) -> None:
        super().__init__()
        check(r=r, lora_dropout=lora_dropout, init_lora_weights=init_lora_weights)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = lora_dropout
        self.unmerged_weight: Tensor | None = None
        weight = self.weight
        dtype = adapter_dtype(weight)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=weight.device))
        self.lora_magnitude: nn.Parameter | None = None
        self.original_weight: Tensor | None = None
        self._start: tuple[Tensor, Tensor] | None = None
        self.residual_weight: Tensor | None = None
        self.reset_parameters(init_lora_weights)
        if use_dora:
            self.lora_magnitude = nn.Parameter(self._weight_norm().to(dtype))

    def reset_parameters(self, init_lora_weights: InitLoRA) -> None:
        """Start A and B anew, as `init_lora_weights` says.

        Raises:
            LitPeftError: it is not known, or W, quantized or too small, has no such start.
        """
        check(init_lora_weights=init_lora_weights)
        if init_lora_weights in ("pissa", "olora"):
            self._start_from_weight(init_lora_weights)
            return
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @torch.no_grad()
    def _start_from_weight(self, how: str) -> None:
        if is_quantized(self.base_layer):
            raise LitPeftError(
                f"init_lora_weights={how!r} needs the layer's weight in floating point, and this layer is quantized: "
                "use init_lora_weights='kaiming'."
            )
        most = min(self.in_features, self.out_features)
        if self.r > most:
            raise LitPeftError(
                f"r={self.r} with init_lora_weights={how!r}: a weight of {self.out_features} by {self.in_features} has "
                f"such a start up to r={most}: give a smaller r (or rank_pattern), or init_lora_weights='kaiming'."
            )
        if how == "pissa" and self.scaling <= 0:
            raise LitPeftError(f"lora_alpha={self.lora_alpha} with init_lora_weights='pissa': give a positive number.")
        if self.weight.is_meta:
            return
        weight = self.dense_weight().float()
        if how == "pissa":
            left, singular, right = torch.linalg.svd(weight, full_matrices=False)
            root = (singular[: self.r] / self.scaling).sqrt()
            a, b = root[:, None] * right[: self.r], left[:, : self.r] * root
        else:
            q, upper = torch.linalg.qr(weight)
            a, b = upper[: self.r], q[:, : self.r]
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        # What the update now carries leaves W, so that the sum starts as the base; kept to restore W exactly.
        self.original_weight = self.weight.detach().clone()
        self._start = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        self.add_to_weight(-self.delta_weight())

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as the base layer stores it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the base weight."""
        return self.unmerged_weight is not None

    @property
    def moved(self) -> bool:
        """Whether the start (PiSSA's, OLoRA's) moved part of the base weight into the update."""
        return self.original_weight is not None

    def plain(self) -> tuple[Tensor, Tensor]:
        """A and B, scale s, for the base weight W₀ as it was; of twice the rank where part of it moved.

        With A₀ and B₀ the start, `W₀ - s·B₀A₀ + s·B A = W₀ + s·[B, -B₀] [A; A₀]`.
        """
        if self._start is None:
            return self.lora_A, self.lora_B
        a, b = (start.to(self.lora_A) for start in self._start)
        return torch.cat([self.lora_A, a]), torch.cat([self.lora_B, -b], 1)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, if it has one."""
        return getattr(self.base_layer, "bias", None)

    def dense_weight(self) -> Tensor:
        """Return W as a dense matrix, shape (out_features, in_features)."""
        return self.weight.detach()

    def add_to_weight(self, delta: Tensor) -> None:
        """Add `delta`, shape (out_features, in_features), to the base layer's weight in place."""
        self.weight.data.add_(delta.to(self.weight.dtype))

    def delta_weight(self) -> Tensor:
        """Return s · B A, shape (out_features, in_features)."""
        return (self.lora_B @ self.lora_A) * self.scaling

    @torch.no_grad()
    def _weight_norm(self) -> Tensor:
        """Norm of each row of W + s·BA; a constant for the gradient (DoRA, section 4.3). Shape (out_features,).

        No matrix of W's size is made: with w, b rows of W and B,
        `||w + s·bA||² = ||w||² + 2s·(w Aᵀ)·b + s²·(b A Aᵀ)·b`.
        """
        dense, precise = self.dense_weight(), torch.promote_types(self.lora_A.dtype, torch.float32)
        a, b = self.lora_A.to(precise), self.lora_B.to(precise)
        own = torch.linalg.vector_norm(dense, dim=1, dtype=precise).square()
        cross = ((dense @ self.lora_A.to(dense.dtype).T).to(precise) * b).sum(1)
        update = ((b @ (a @ a.T)) * b).sum(1)
        square = own + 2 * self.scaling * cross + self.scaling**2 * update
        return square.clamp_(min=0).sqrt_().to(dense.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the base weight, in place. Does nothing when it is folded in already.

        Raises:
            LitPeftError: the base layer is quantized and cannot take an update.
        """
        if self.merged:
            return
        if is_quantized(self.base_layer):
            raise LitPeftError(
                f"This {type(self.base_layer).__name__} is quantized and cannot take an update and give it back: use "
                "lit_peft.merge(model), which dequantizes the model for good."
            )
        # Rounding makes (W + d) - d differ from W, so W itself is kept to come back to.
        self.unmerged_weight = self.weight.detach().clone()
        delta = self.delta_weight()
        if self.lora_magnitude is not None:
            dense = self.dense_weight().to(delta.dtype)
            merged = (self.lora_magnitude / self._weight_norm())[:, None] * (dense + delta)
            delta = merged - dense
        self.add_to_weight(delta)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: the base weight is what it was, bit for bit."""
        if self.unmerged_weight is not None:
            self.weight.data.copy_(self.unmerged_weight)
            self.unmerged_weight = None

    def keep_merged(self) -> None:
        """Make a merge final: the base layer keeps the merged weight, and the kept copies of W are let go."""
        self.unmerged_weight = self.original_weight = None

    def restore_base(self) -> nn.Module:
        """Return the base layer as it was before it was adapted, bit for bit."""
        if self.merged:
            self.unmerge()
        if self.original_weight is not None:
            self.weight.data.copy_(self.original_weight)
        return self.base_layer

    def suspend(self) -> None:
        """Keep what a start of PiSSA's or OLoRA's kind left in W, before the base gets its own W back."""
        if self.original_weight is not None:
            self.unmerge()
            self.residual_weight = self.weight.detach().clone()

    def resume(self) -> None:
        """Follow the base layer's device, and take out of W again what the update carries."""
        base = self.base_layer._parameters.values()
        if any(parameter is not None and parameter.requires_grad for parameter in base):
            self.base_layer.requires_grad_(False)
        if self.lora_A.device != self.weight.device:
            for parameter in self.parameters(recurse=False):
                parameter.data = parameter.data.to(self.weight.device)
        if self.residual_weight is not None:
            self.weight.data.copy_(self.residual_weight)
            self.residual_weight = None

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}" + (
            ", use_dora=True" if self.lora_magnitude is not None else ""
        )


class LoRALinear(LoRALayer):
    """`h = W x + b + s · B A dropout(x)`, for any layer that multiplies by a weight (2106.09685, equation 3).

    Takes `nn.Linear` and its quantized relatives, and layers that store W transposed (transformers' `Conv1D`).
    With `use_dora`, `h = m / ||W + s·BA|| · (W x + s · B A x) + b`.

    Args:
        base_layer: the layer to adapt.
        fan_in_fan_out: W is stored as (in_features, out_features); found from the layer's type when None.
        **settings: as `LoRALayer`.

    Shapes:
        input (..., in_features) → output (..., out_features)
    """

    def __init__(self, base_layer: nn.Module, *, fan_in_fan_out: bool | None = None, **settings: object) -> None:
        if fan_in_fan_out is None:
            fan_in_fan_out = stores_transposed(base_layer)
        self.fan_in_fan_out = fan_in_fan_out
        d_in, d_out = linear_features(base_layer, fan_in_fan_out)
        super().__init__(base_layer, d_in, d_out, **settings)  # type: ignore[arg-type]

    def dense_weight(self) -> Tensor:
        if is_quantized(self.base_layer):
            return dense_weight(self.base_layer)
        weight = self.weight.detach()
        return weight.T if self.fan_in_fan_out else weight

    def add_to_weight(self, delta: Tensor) -> None:
        super().add_to_weight(delta.T if self.fan_in_fan_out else delta)

    def _is_plain(self, x: Tensor, base: nn.Module, weight: Tensor) -> bool:
        """Whether base and update are two products and nothing else, which `lora_linear` computes as one."""
        return (
            FUSED
            and self.lora_magnitude is None
            and self.unmerged_weight is None
            and (type(base) in (nn.Linear, QuantizedLinear) or stores_transposed(base))
            and type(weight) is nn.Parameter
            and not weight.requires_grad
            and (weight.dtype == x.dtype or type(base) is QuantizedLinear or autocast_dtype(x.device) is not None)
            and x.is_floating_point()
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not torch.compiler.is_compiling()
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # Each attribute is looked up once: where a token is decoded, that is a good part of the time.
        base: Any = self.base_layer
        weight = base.weight
        if not args and not kwargs and self._is_plain(x, base, weight):
            weight = weight.T if self.fan_in_fan_out else weight
            dropout = self.lora_dropout if self.training else 0.0
            codes = (base.scale, base.zero_point) if type(base) is QuantizedLinear else ()
            return lora_linear(x, weight, base.bias, self.lora_A, self.lora_B, self.scaling, dropout, *codes)
        out: Tensor = base(x, *args, **kwargs)
        if self.merged:
            return out
        dropped = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        # A and B are cast, not x: they are the smaller ones.
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        update = F.linear(F.linear(dropped, a) * self.scaling, b)
        if self.lora_magnitude is None:
            return out + update.to(out.dtype)
        scale = (self.lora_magnitude / self._weight_norm()).to(out.dtype)
        bias = self.bias
        product = out if bias is None else out - bias
        if self.training and self.lora_dropout:
            # DoRA's magnitude acts on what the update saw; the base's own output stays whole.
            weight = self.dense_weight().to(x.dtype)
            return out + (scale - 1) * F.linear(dropped, weight) + scale * update
        result = scale * (product + update)
        return result if bias is None else result + bias


class LoRAEmbedding(LoRALayer):
    """`h = W[x] + s · (B A)ᵀ[x]`: LoRA on an embedding table (2106.09685, as its reference code has it).

    A has shape (r, num_embeddings) and starts at zero, B has shape (embedding_dim, r) and starts normal.

    Args:
        base_layer: the embedding to adapt.
        **settings: as `LoRALayer`; dropout is not used, there is no dense input to drop.

    Shapes:
        input (...) of token ids → output (..., embedding_dim)
    """

    def __init__(self, base_layer: nn.Embedding, **settings: object) -> None:
        super().__init__(
            base_layer,
            base_layer.num_embeddings,
            base_layer.embedding_dim,
            **settings,  # type: ignore[arg-type]
        )
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx = base_layer.padding_idx

    def reset_parameters(self, init_lora_weights: InitLoRA) -> None:
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
        # Some models scale inside their embedding (Gemma's embed_scale); the update is scaled alike.
        factor = getattr(self.base_layer, "embed_scale", None)
        update = (F.embedding(x, self.lora_A.T) @ self.lora_B.T * self.scaling).to(out.dtype)
        if factor is not None:
            update = update * torch.as_tensor(factor, dtype=out.dtype, device=out.device)
        if self.lora_magnitude is None:
            return out + update
        return (self.lora_magnitude / self._weight_norm()).to(out.dtype) * (out + update)


def check(
    *, r: int | None = None, lora_dropout: float | None = None, init_lora_weights: InitLoRA | None = None
) -> None:
    """Check the settings of a LoRA layer that are given.

    Raises:
        LitPeftError: the rank is not positive, the dropout not in [0, 1), or the start not known.
    """
    if r is not None and r < 1:
        raise LitPeftError(f"r={r}: the rank must be a positive integer, e.g. r=8.")
    if lora_dropout is not None and not 0.0 <= lora_dropout < 1.0:
        raise LitPeftError(f"lora_dropout={lora_dropout}: give a probability from 0 up to, not including, 1.")
    if init_lora_weights is not None and init_lora_weights not in get_args(InitLoRA):
        known = closest(init_lora_weights, get_args(InitLoRA), 4)
        raise LitPeftError(f"init_lora_weights={init_lora_weights!r} is not known: use {known}.")
