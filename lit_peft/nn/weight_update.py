"""What layers that add an update to a frozen weight share: the layer, merging and unmerging."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_peft.nn.quantized import is_quantized
from lit_peft.util.errors import LitPeftError


class WeightUpdate(nn.Module):
    """Base class of layers that add an update to the weight of a frozen layer, `base_layer`.

    Attributes:
        in_features: d_in, the size of the update's input.
        out_features: d_out, the size of the update's output.
        original_weight: a copy of W if attaching changed it, else None.
        unmerged_weight: a copy of W while the update is merged.
        unmerged_bias: a copy of the base layer's bias while an update of it is merged.
    """

    in_features: int
    out_features: int
    original_weight: Tensor | None = None
    unmerged_weight: Tensor | None = None
    unmerged_bias: Tensor | None = None

    def keep_base(self, base_layer: nn.Module) -> None:
        """Keep the layer to adapt, and freeze its parameters."""
        self.base_layer = base_layer.requires_grad_(False)

    def lend_base(self) -> None:
        """Keep the base layer without owning it, while another module has it: it is no submodule of two modules."""
        base_layer = self.base_layer
        del self.base_layer
        object.__setattr__(self, "base_layer", base_layer)

    def take_base(self, base_layer: nn.Module) -> None:
        """Own the base layer again."""
        vars(self).pop("base_layer", None)
        self.base_layer = base_layer

    def replace_base(self, base_layer: nn.Module) -> None:
        """Use another layer in the place of the base layer."""
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as the base layer stores it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, if it has one."""
        return getattr(self.base_layer, "bias", None)

    @property
    def merged(self) -> bool:
        """Whether the update is merged into the base weight."""
        return self.unmerged_weight is not None

    def dense_weight(self) -> Tensor:
        """Return W as a dense matrix, shape (out_features, in_features)."""
        return self.weight.detach()

    def add_to_weight(self, delta: Tensor) -> None:
        """Add `delta`, shape (out_features, in_features), to the base layer's weight in place."""
        self.weight.data.add_(delta.to(self.weight.dtype))

    def delta_weight(self) -> Tensor:
        """Return the update of the weight, shape (out_features, in_features)."""
        raise NotImplementedError

    def delta_bias(self) -> Tensor | None:
        """Return the update of the bias, shape (out_features,); None if the bias has none."""
        return None

    def weight_change(self) -> Tensor:
        """Return what a merge adds to W, shape (out_features, in_features)."""
        return self.delta_weight()

    def split_dims(self, by_rows: bool) -> dict[str, int | None]:
        """Return how the update is divided with W over several processes: for each parameter the dimension, or None.

        Args:
            by_rows: whether each process has rows of W, and so a part of the outputs, rather than columns.
        """
        raise NotImplementedError

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the update."""
        return list(self.parameters(recurse=False))

    def check_kind(self) -> None:
        """Check that layers of this kind can be merged.

        Raises:
            LitPeftError: they cannot.
        """

    @torch.no_grad()
    def check_mergeable(self) -> None:
        """Check that the update can be merged and that the result would be finite. Nothing is changed.

        Raises:
            LitPeftError: the update, the base weight or their sum has NaN or infinite numbers, or there is an update of
                the bias and the base layer has no bias.
        """
        self.check_kind()
        if not all(torch.isfinite(parameter).all() for parameter in self.own_parameters()):
            raise self._not_finite("adapter")
        if self.delta_bias() is not None and self.bias is None:
            raise LitPeftError(
                f"The update of a {type(self.base_layer).__name__} ({self.out_features} by {self.in_features}) has a "
                "bias (lora_bias=True) and the layer has none, so it cannot be merged: keep the adapter, or train it "
                "without lora_bias."
            )
        if self.merged:
            return
        dense = self.dense_weight()
        if not torch.isfinite(dense).all():
            raise self._not_finite("base")
        change = self.weight_change()
        if not torch.isfinite((dense.to(change.dtype) + change).to(dense.dtype)).all():
            raise self._not_finite("sum, which is too large for the weight's dtype")

    def _not_finite(self, source: str) -> LitPeftError:
        return LitPeftError(
            f"The update of a {type(self.base_layer).__name__} ({self.out_features} by {self.in_features}) cannot be "
            f"merged: the result would have NaN or infinite numbers, which come from the {source}. Training has "
            "probably diverged: load an earlier checkpoint."
        )

    @torch.no_grad()
    def merge(self, check: bool = True) -> None:
        """Add the update to the base weight in place. Does nothing if it is merged already.

        Args:
            check: whether to call `check_mergeable` first.

        Raises:
            LitPeftError: the base layer is quantized or has no bias to update, or the sum has NaN or infinite numbers.
                The layer is as it was.
        """
        if self.merged:
            return
        if is_quantized(self.base_layer):
            raise LitPeftError(
                f"This {type(self.base_layer).__name__} is quantized, so an update cannot be added to its weight and "
                "removed again: use lit_peft.merge(model), which dequantizes the model for good."
            )
        if check:
            self.check_mergeable()
        change, bias_change, bias = self.weight_change(), self.delta_bias(), self.bias
        # (W + d) - d is not W after rounding, so W itself is kept.
        self.unmerged_weight = self.weight.detach().clone()
        self.add_to_weight(change)
        if bias is not None and bias_change is not None:
            self.unmerged_bias = bias.detach().clone()
            bias.data.add_(bias_change.to(bias.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: restore the base weight bit for bit."""
        if self.unmerged_weight is not None:
            self.weight.data.copy_(self.unmerged_weight)
            self.unmerged_weight = None
        if self.unmerged_bias is not None and self.bias is not None:
            self.bias.data.copy_(self.unmerged_bias)
            self.unmerged_bias = None

    def keep_merged(self) -> None:
        """Make a merge final: the base layer keeps the merged weight, and the copies of W are freed."""
        self.unmerged_weight = self.unmerged_bias = None

    def follow_weight(self) -> None:
        """Move the parameters of the update to the device of W."""
        for parameter in self.own_parameters():
            if parameter.device != self.weight.device:
                parameter.data = parameter.data.to(self.weight.device)

    def resume(self) -> None:
        """Prepare for being put back on the model: freeze the base layer and follow its device."""
        if any(parameter.requires_grad for parameter in self.base_layer.parameters(recurse=False)):
            self.base_layer.requires_grad_(False)
        self.follow_weight()

    def restore_base(self) -> nn.Module:
        """Return the base layer as it was before it was adapted, bit for bit."""
        self.unmerge()
        return self.base_layer
