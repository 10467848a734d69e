"""Experts of a mixture that are stored as one parameter: no linear layers, so adapters and quantization skip them."""

from __future__ import annotations

from torch import Tensor, nn


def stacked_experts(model: nn.Module) -> dict[str, Tensor]:
    """Return the unquantized parameters that hold the weights of several experts, by name.

    These are matrices stacked along a first dimension. Convolutions are not among them.
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, convolutions):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            stacked = parameter.dim() == 3 and min(parameter.shape) > 1
            named = parameter.dim() == 2 and not isinstance(module, nn.Linear) and "experts" in name.split(".")
            if (stacked or named) and parameter.is_floating_point():
                found[name] = parameter
    return found


def experts_left_out(model: nn.Module) -> str | None:
    """Return a sentence on the share of a model's weights that stacked experts have; None if there are none."""
    experts = stacked_experts(model)
    if not experts:
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in experts.values()) / total
    return (
        f"{share:.0%} of the weights of {type(model).__name__} are experts that are stored as one parameter for all of "
        f"them (e.g. {next(iter(experts))}), not as linear layers"
    )
