"""LoRA on convolutions: A is a convolution of the layer's own shape with r channels, and B one of width 1."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.lora_layer import LoRALayer
from lit_peft.util.errors import LitPeftError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoRAConv(LoRALayer):
    """`h = W * x + b + s · B (A * dropout(x))`, where `*` is a convolution (2106.09685 on each window of the input).

    With `use_dora`, `h = m / ||W + s·BA|| · (W * x + s · B (A * x)) + b`, a magnitude for each output channel.

    A is kept as a matrix, shape (r, in_channels · kernel), and B has the shape (out_channels, r / groups). With groups,
    A reads all input channels, as in peft, so the update has no form that fits into W and cannot be merged.

    Args:
        base_layer: the convolution to adapt.
        **settings: see `LoRALayer`.

    Raises:
        LitPeftError: the layer is a transposed convolution or pads with something else than zeros, or `r` is no
            multiple of its groups.

    Shapes:
        input (..., in_channels, *size) → output (..., out_channels, *size')
    """

    def __init__(self, base_layer: nn.Module, **settings: Any) -> None:
        conv: Any = base_layer
        self.groups, rank = int(conv.groups), settings.get("r", 8)
        name = f"A {type(base_layer).__name__} of {conv.in_channels} to {conv.out_channels} channels"
        if conv.padding_mode != "zeros":
            raise LitPeftError(
                f"{name} has padding_mode={conv.padding_mode!r}, and LoRA supports 'zeros' alone: leave the layer out "
                "of target_modules."
            )
        if rank % self.groups:
            raise LitPeftError(
                f"{name} has groups={self.groups}, and r={rank} is no multiple of them: choose another r (or one in "
                "rank_pattern), or leave the layer out of target_modules."
            )
        if self.groups > 1 and (settings.get("use_dora") or settings.get("init_lora_weights") in ("pissa", "olora")):
            raise LitPeftError(
                f"{name} has groups={self.groups}, for which neither use_dora=True nor init_lora_weights='pissa' or "
                "'olora' is defined: leave the layer out of target_modules, or leave these settings out."
            )
        kernel = conv.weight[0, 0].numel()
        super().__init__(base_layer, conv.in_channels * kernel, conv.out_channels, **settings)

    def dense_weight(self) -> Tensor:
        return self.weight.detach().flatten(1)

    def add_to_weight(self, delta: Tensor) -> None:
        super().add_to_weight(delta.view_as(self.weight))

    def check_kind(self) -> None:
        if self.groups > 1:
            raise LitPeftError(
                f"The update of a {type(self.base_layer).__name__} with groups={self.groups} cannot be merged, because "
                "it reads all input channels and the layer's weight does not (nor can peft merge it): keep the adapter."
            )

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Return A, shape (r, in_channels, *kernel), and B, shape (out_channels, r / groups, 1, …), as peft does."""
        sizes: Any = self.base_layer.kernel_size
        return self.lora_A.unflatten(1, (-1, *sizes)), self.lora_B.view(*self.lora_B.shape, *(1 for _ in sizes))

    def update(self, x: Tensor) -> Tensor:
        """Return what the update adds to the output."""
        base: Any = self.base_layer
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.weight.dim()]
        a, b = (kernel.to(x.dtype) for kernel in self.kernels())
        low = convolve(x, a, None, base.stride, base.padding, base.dilation)
        bias = None if self.lora_bias is None else self.lora_bias.to(x.dtype) * self.scaling
        out: Tensor = convolve(low * self.scaling, b, bias, groups=self.groups)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        if self.merged:
            return out
        dropped = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        update = self.update(dropped).to(out.dtype)
        if self.lora_magnitude is None:
            return out + update
        end = (1,) * (self.weight.dim() - 2)
        scale = (self.lora_magnitude / self._weight_norm()).to(out.dtype).view(-1, *end)
        bias = None if self.bias is None else self.bias.to(out.dtype).view(-1, *end)
        if self.training and self.lora_dropout:
            # DoRA's magnitude scales W times the dropped input; the base's own output is not dropped.
            product = self.base_layer(dropped) if bias is None else self.base_layer(dropped) - bias
            return out + (scale - 1) * product + scale * update
        result = scale * ((out if bias is None else out - bias) + update)
        return result if bias is None else result + bias
