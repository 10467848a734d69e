"""What LoRA layers share: the frozen layer, A and B, the scale, merging (Hu et al. 2021, arXiv:2106.09685).

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
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_peft.nn.linear import adapter_dtype
from lit_peft.nn.quantized import is_quantized
from lit_peft.util.errors import LitPeftError, closest

InitLoRA = Literal["kaiming", "gaussian", "pissa", "olora"]


class LoRALayer(nn.Module):
    """Base class of the LoRA layers.

    Args:
        base_layer: the layer to adapt; it is kept, not copied, and its parameters are frozen.
        in_features: d_in, the size of the update's input.
        out_features: d_out, the size of the update's output.
        r: rank of the update.
        lora_alpha: the update is scaled by `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`).
        lora_dropout: dropout probability of the update's input.
        use_rslora: rank-stabilized scale (arXiv:2312.03732).
        use_dora: weight-decomposed update (arXiv:2402.09353): one trained magnitude per output feature.
        init_lora_weights: how A and B are initialized: `kaiming` (A Kaiming-uniform, B zero: the update is zero),
            `gaussian` (A normal with standard deviation 1/r, B zero), `pissa` (principal singular vectors,
            arXiv:2404.02948) or `olora` (QR, arXiv:2406.01775). The last two move part of W into the update.

    Raises:
        LitPeftError: a setting is out of range (see `check`), or W, quantized or too small, allows no such
            initialization.
    """

    # The dimensions of A and B before their last two: for a stack of matrices, their number.
    stack: tuple[int, ...] = ()

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
        check(r=r, lora_dropout=lora_dropout)
        self.keep_base(base_layer)
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = lora_dropout
        # A copy of W while the update is merged.
        self.unmerged_weight: Tensor | None = None
        weight = self.weight
        dtype = adapter_dtype(weight)
        self.lora_A = nn.Parameter(torch.empty(*self.stack, r, in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(*self.stack, out_features, r, dtype=dtype, device=weight.device))
        self.lora_magnitude: nn.Parameter | None = None
        # With PiSSA and OLoRA: W as it was, the first A and B, and W without them while the layer is suspended.
        self.original_weight: Tensor | None = None
        self._start: tuple[Tensor, Tensor] | None = None
        self.residual_weight: Tensor | None = None
        self.reset_parameters(init_lora_weights)
        if use_dora:
            self.lora_magnitude = nn.Parameter(self._weight_norm().to(dtype))

    def keep_base(self, base_layer: nn.Module) -> None:
        """Keep the layer to adapt, and freeze its parameters."""
        self.base_layer = base_layer.requires_grad_(False)

    def reset_parameters(self, init_lora_weights: InitLoRA) -> None:
        """Initialize A and B again.

        Raises:
            LitPeftError: the initialization is unknown, or W, quantized or too small, does not allow it.
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
    def _start_from_weight(self, method: str) -> None:
        if is_quantized(self.base_layer):
            raise LitPeftError(
                f"init_lora_weights={method!r} needs the layer's weight in floating point, and this layer is "
                "quantized: use init_lora_weights='kaiming'."
            )
        largest = min(self.in_features, self.out_features)
        if self.r > largest:
            raise LitPeftError(
                f"r={self.r} with init_lora_weights={method!r}: a weight of {self.out_features} by {self.in_features} "
                f"allows at most r={largest}: give a smaller r (or rank_pattern), or init_lora_weights='kaiming'."
            )
        if method == "pissa" and self.scaling <= 0:
            raise LitPeftError(f"lora_alpha={self.lora_alpha} with init_lora_weights='pissa': give a positive number.")
        if self.weight.is_meta:
            return
        weight = self.dense_weight().float()
        if method == "pissa":
            left, singular, right = torch.linalg.svd(weight, full_matrices=False)
            root = (singular[: self.r] / self.scaling).sqrt()
            a, b = root[:, None] * right[: self.r], left[:, : self.r] * root
        else:
            q, upper = torch.linalg.qr(weight)
            a, b = upper[: self.r], q[:, : self.r]
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        # W loses what the update now contains, so that their sum is W. A copy of W restores it exactly later.
        self.original_weight = self.weight.detach().clone()
        self._start = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        self.add_to_weight(-self.delta_weight())

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as the base layer stores it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether the update is merged into the base weight."""
        return self.unmerged_weight is not None

    @property
    def moved(self) -> bool:
        """Whether the initialization (PiSSA, OLoRA) moved part of the base weight into the update."""
        return self.original_weight is not None

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the same update to the original base weight W₀, with scale s.

        They have twice the rank if the initialization moved part of W₀: with its A₀ and B₀,
        `W₀ - s·B₀A₀ + s·B A = W₀ + s·[B, -B₀] [A; A₀]`.
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
        """Norm of each row of W + s·BA; constant for the gradient (DoRA, section 4.3). Shape (out_features,).

        It is computed without a matrix of W's size. With w and b rows of W and B,
        `||w + s·bA||² = ||w||² + 2s·(w Aᵀ)·b + s²·(b A Aᵀ)·b`.
        """
        dense, precise = self.dense_weight(), torch.promote_types(self.lora_A.dtype, torch.float32)
        a, b = self.lora_A.to(precise), self.lora_B.to(precise)
        own = torch.linalg.vector_norm(dense, dim=1, dtype=precise).square()
        cross = ((dense @ self.lora_A.to(dense.dtype).T).to(precise) * b).sum(1)
        update = ((b @ (a @ a.T)) * b).sum(1)
        square = own + 2 * self.scaling * cross + self.scaling**2 * update
        return square.clamp_(min=0).sqrt_().to(dense.dtype)

    def check_finite(self) -> None:
        """Check that a merge would give finite numbers, before any weight changes.

        Raises:
            LitPeftError: the update or the base weight has NaN or infinite numbers.
        """
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters(recurse=False)):
            raise self._not_finite("adapter")
        if not is_quantized(self.base_layer) and not torch.isfinite(self.dense_weight()).all():
            raise self._not_finite("base")

    def _not_finite(self, source: str) -> LitPeftError:
        return LitPeftError(
            f"The update of a {type(self.base_layer).__name__} ({self.out_features} by {self.in_features}) cannot be "
            f"merged: the result would have NaN or infinite numbers, which come from the {source}. Training has "
            "probably diverged: load an earlier checkpoint."
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight in place. Does nothing if it is merged already.

        Raises:
            LitPeftError: the base layer is quantized, or the sum has NaN or infinite numbers. The layer is as it was.
        """
        if self.merged:
            return
        if is_quantized(self.base_layer):
            raise LitPeftError(
                f"This {type(self.base_layer).__name__} is quantized, so an update cannot be added to its weight and "
                "removed again: use lit_peft.merge(model), which dequantizes the model for good."
            )
        delta = self.delta_weight()
        if self.lora_magnitude is not None:
            dense = self.dense_weight().to(delta.dtype)
            merged = (self.lora_magnitude / self._weight_norm())[:, None] * (dense + delta)
            delta = merged - dense
        # (W + d) - d is not W after rounding, so W itself is kept.
        unmerged = self.weight.detach().clone()
        self.add_to_weight(delta)
        if not torch.isfinite(self.weight).all():
            self.weight.data.copy_(unmerged)
            self.check_finite()
            raise self._not_finite("sum, which is too large for the weight's dtype")
        self.unmerged_weight = unmerged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: restore the base weight bit for bit."""
        if self.unmerged_weight is not None:
            self.weight.data.copy_(self.unmerged_weight)
            self.unmerged_weight = None

    def keep_merged(self) -> None:
        """Make a merge final: the base layer keeps the merged weight, and the copies of W are freed."""
        self.unmerged_weight = self.original_weight = None

    def restore_base(self) -> nn.Module:
        """Return the base layer as it was before it was adapted, bit for bit."""
        if self.merged:
            self.unmerge()
        if self.original_weight is not None:
            self.weight.data.copy_(self.original_weight)
        return self.base_layer

    def suspend(self) -> None:
        """Prepare for being taken off the model: keep what PiSSA or OLoRA left in W, before W is restored."""
        if self.original_weight is not None:
            self.unmerge()
            self.residual_weight = self.weight.detach().clone()

    def resume(self) -> None:
        """Prepare for being put back: follow the base layer's device, and take out of W what the update contains."""
        if any(parameter.requires_grad for parameter in self.base_layer.parameters(recurse=False)):
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


def check(
    *, r: int | None = None, lora_dropout: float | None = None, init_lora_weights: InitLoRA | None = None
) -> None:
    """Check the settings of a LoRA layer that are given.

    Raises:
        LitPeftError: the rank is not positive, the dropout not in [0, 1), or the initialization unknown.
    """
    if r is not None and r < 1:
        raise LitPeftError(f"r={r}: the rank must be a positive integer, e.g. r=8.")
    if lora_dropout is not None and not 0.0 <= lora_dropout < 1.0:
        raise LitPeftError(f"lora_dropout={lora_dropout}: give a probability of at least 0 and below 1.")
    if init_lora_weights is not None and init_lora_weights not in get_args(InitLoRA):
        known = closest(init_lora_weights, get_args(InitLoRA), 4)
        raise LitPeftError(f"init_lora_weights={init_lora_weights!r} is not known: use {known}.")
