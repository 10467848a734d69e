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

from lit_peft.nn.deferred import parameter_device
from lit_peft.nn.linear import adapter_dtype
from lit_peft.nn.quantized import is_quantized
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError, closest

InitLoRA = Literal["kaiming", "gaussian", "pissa", "olora"]


class LoRALayer(WeightUpdate):
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
        lora_bias: whether the update has a bias of its own: `s · (B A x + bias)`.

    Raises:
        LitPeftError: a setting is out of range (see `check`), or W, quantized or too small, allows no such
            initialization.
    """

    # The dimensions of A and B before their last two: for a stack of matrices, their number.
    stack: tuple[int, ...] = ()
    # The groups of a convolution: each part of B's outputs reads its own part of the rank.
    groups: int = 1

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
        lora_bias: bool = False,
    ) -> None:
        super().__init__()
        check(r=r, lora_dropout=lora_dropout)
        self.keep_base(base_layer)
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha = r, lora_alpha
        # `rescale` multiplies the scale that the settings give by `scale_factor`.
        self.initial_scaling = self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.scale_factor = 1.0
        self.lora_dropout = lora_dropout
        dtype, device = adapter_dtype(self.weight), parameter_device(self.weight)
        self.lora_A = nn.Parameter(torch.empty(*self.stack, r, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(*self.stack, out_features, r // self.groups, dtype=dtype, device=device))
        self.lora_bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if lora_bias else None
        self.lora_magnitude: nn.Parameter | None = None
        # With PiSSA and OLoRA: W as it was, the first A and B, and W without them while the layer is suspended.
        self.original_weight = None
        self._start: tuple[Tensor, Tensor] | None = None
        self.residual_weight: Tensor | None = None
        self.reset_parameters(init_lora_weights)
        if use_dora:
            known = not self.lora_A.is_meta or self.weight.is_meta
            norm = self._weight_norm() if known else torch.empty(out_features, device=device)
            self.lora_magnitude = nn.Parameter(norm.to(dtype))

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
        if self.weight.is_meta or self.lora_A.is_meta:
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
    def moved(self) -> bool:
        """Whether the initialization (PiSSA, OLoRA) moved part of the base weight into the update."""
        return self.original_weight is not None

    def rescale(self, factor: float) -> None:
        """Multiply the scale that the settings give by a factor. The last call counts."""
        self.scale_factor, self.scaling = factor, self.initial_scaling * factor

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the same update to the original base weight W₀, with scale s.

        They have twice the rank if the initialization moved part of W₀: with its A₀ and B₀,
        `W₀ - s·B₀A₀ + s·B A = W₀ + s·[B, -B₀] [A; A₀]`.
        """
        if self._start is None:
            return self.lora_A, self.lora_B
        a, b = (start.to(self.lora_A) for start in self._start)
        return torch.cat([self.lora_A, a]), torch.cat([self.lora_B, -b], 1)

    def update(self, x: Tensor) -> Tensor:
        """Return what the update adds to the layer's output, without dropout.

        Args:
            x: the layer's input.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute its update apart from the layer.")

    def delta_weight(self) -> Tensor:
        """Return s · B A, shape (out_features, in_features)."""
        return (self.lora_B @ self.lora_A) * self.scaling

    def delta_bias(self) -> Tensor | None:
        return None if self.lora_bias is None else self.lora_bias * self.scaling

    def weight_change(self) -> Tensor:
        delta = self.delta_weight()
        if self.lora_magnitude is None:
            return delta
        dense = self.dense_weight().to(delta.dtype)
        return (self.lora_magnitude / self._weight_norm())[:, None] * (dense + delta) - dense

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

    def keep_merged(self) -> None:
        super().keep_merged()
        self.original_weight = None

    def restore_base(self) -> nn.Module:
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
        """Prepare for being put back: as any update, and take out of W what this one contains."""
        super().resume()
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
