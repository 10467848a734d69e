"""Experts of a mixture that are stored as one parameter: no linear layers, so adapters and quantization skip them."""

from __future__ import annotations

from torch import Tensor, nn

from lit_peft.nn.expert_lora import ExpertLoRA


def stacked_experts(model: nn.Module) -> dict[str, Tensor]:
    """Return the unquantized parameters that hold the weights of several experts, by name, adapted or not.

    These are matrices stacked along a first dimension. Convolutions are not among them, nor an adapter's own matrices.
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    passed_over = (*convolutions, ExpertLoRA)
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, passed_over):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            stacked = parameter.dim() == 3 and min(parameter.shape) > 1
            named = parameter.dim() == 2 and not isinstance(module, nn.Linear) and "experts" in name.split(".")
            # One bias for each expert is a matrix too.
            named = named and not name.endswith("bias")
            if (stacked or named) and parameter.is_floating_point():
                found[name] = parameter
    return found


def experts_left_out(model: nn.Module) -> str | None:
    """Return a sentence on the share of a model's weights in stacked experts without a LoRA; None if there are none."""
    adapted = {id(layer.weight) for layer in model.modules() if isinstance(layer, ExpertLoRA)}
    experts = {name: weight for name, weight in stacked_experts(model).items() if id(weight) not in adapted}
    if not experts:
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in experts.values()) / total
    return (
        f"{share:.0%} of the weights of {type(model).__name__} are experts that are stored as one parameter for all of "
        f"them (e.g. {next(iter(experts))}), not as linear layers"
    )


def experts_adapted(model: nn.Module) -> str | None:
    """Return a sentence on what a LoRA on stacked experts trains; None if the model has none."""
    layers = [layer for layer in model.modules() if isinstance(layer, ExpertLoRA) and layer.stack]
    if not layers:
        return None
    trained = sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))
    experts = sorted({layer.stack[0] for layer in layers})
    count = f"{experts[0]}" if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
    return f"LoRA on {len(layers)} parameters × {count} experts trains {trained:,} parameters"
