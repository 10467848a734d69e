"""LoRA on parameters that are no linear layers: which ones, and how they are adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.changes import ReplaceModule
from lit_peft.methods.targets import keep_layers
from lit_peft.models.experts import adaptable_weights, quantized_experts, stacked_experts
from lit_peft.nn.expert_lora import ExpertLoRA, LoRAExperts
from lit_peft.nn.lora_attention import ProjectionLoRA
from lit_peft.nn.lora_layer import InitLoRA
from lit_peft.nn.quantized_experts import QuantizedWeight
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.expressions import Expressions

_HAVE_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ParameterList, nn.ParameterDict)


def find_parameters(
    model: nn.Module,
    target_parameters: Sequence[str] | None,
    target_experts: bool,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    source: str = "",
) -> list[str]:
    """Return the full names of the parameters to adapt, in the model's order.

    Args:
        model: the model to search.
        target_parameters: names of parameters; one matches by its full name or the last parts of it.
        target_experts: whether to include every parameter that holds the weights of several experts.
        exclude_modules: names or a regular expression of modules or parameters to leave out.
        layers_to_transform: indices of the layers to adapt, starting at 0.
        layers_pattern: the name of the list of layers; any list when None.
        modules_to_save: modules that are trained in full; their parameters are left out.
        source: the file that the settings come from, to begin messages with.

    Raises:
        LitPeftError: a name matches nothing, or a parameter cannot be adapted, or no parameter is left.
    """
    parameters = adaptable_weights(model)
    experts = {*stacked_experts(model), *quantized_experts(model)}
    if target_experts and not experts:
        raise LitPeftError(
            f"target_experts=True, but {type(model).__name__} has no experts that are stored as one parameter: leave "
            "it out. Experts that are linear layers are among target_modules='all-linear'."
        )
    found = experts if target_experts else set()
    for target in target_parameters or ():
        matches = [name for name in parameters if f".{name}".endswith(f".{target}")]
        if not matches:
            raise LitPeftError(_no_match(model, target, parameters, source))
        for name in matches:
            _check(model, name, parameters[name], source)
        found.update(matches)
    if not found:
        return []
    if exclude_modules:
        found = {name for name in found if not _is_excluded(name, exclude_modules)}
    found = {name for name in found if not any(f".{saved}." in f".{name}." for saved in modules_to_save or ())}
    found = set(keep_layers(found, layers_to_transform, layers_pattern, source))
    if not found:
        raise LitPeftError(
            f"{source}target_parameters={list(target_parameters or ())} (target_experts={target_experts}) leaves no "
            f"parameter to adapt: exclude_modules={exclude_modules!r}, layers_to_transform={layers_to_transform!r} or "
            f"modules_to_save={modules_to_save!r} leave out all of them."
        )
    return [name for name in parameters if name in found]


def adapt_parameters(
    attachment: Attachment,
    names: Sequence[str],
    ranks: Mapping[str, float],
    alphas: Mapping[str, float],
    use_rslora: bool,
    init_lora_weights: InitLoRA,
) -> None:
    """Add a LoRA to each of the named parameters.

    Args:
        attachment: makes and records the changes.
        names: full names of the parameters.
        ranks: the rank of each of them.
        alphas: `lora_alpha` of each of them.
        use_rslora: see `LoRASettings`.
        init_lora_weights: see `LoRASettings`.
    """
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for path, own in by_module.items():
        base = attachment.model.get_submodule(path)
        layers = {
            name.rpartition(".")[2]: ExpertLoRA(
                base,
                name.rpartition(".")[2],
                r=int(ranks[name]),
                lora_alpha=alphas[name],
                use_rslora=use_rslora,
                init_lora_weights=init_lora_weights,
            )
            for name in own
        }
        attachment.make(ReplaceModule(path, LoRAExperts(base, layers).train(base.training)))
        attachment.adapted.update({f"{path}.lora_{name}": layer for name, layer in layers.items()})


def target_name(path: str, layer: nn.Module) -> str:
    """Return what a LoRA layer adapts, by its name in the bare model: the parameter of experts, else the module."""
    return f"{path.rpartition('.')[0]}.{layer.target}" if isinstance(layer, ExpertLoRA) else path


def is_expert_lora(layer: nn.Module) -> TypeGuard[ExpertLoRA]:
    """Return whether a layer is what peft adapts as a parameter: not a projection of `nn.MultiheadAttention`."""
    return isinstance(layer, ExpertLoRA) and not isinstance(layer, ProjectionLoRA)


def _is_excluded(name: str, exclude_modules: str | Sequence[str]) -> bool:
    """Whether a parameter or its module is left out."""
    both = (name, name.rpartition(".")[0])
    if isinstance(exclude_modules, str):
        expressions = Expressions("exclude_modules")
        return any(expressions.fullmatch(exclude_modules, known) for known in both)
    return any(f".{known}".endswith(f".{excluded}") for known in both for excluded in exclude_modules)


def _check(model: nn.Module, name: str, parameter: Tensor, source: str) -> None:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    start = f"{source}target_parameters includes {name}"
    if isinstance(owner, nn.Linear | nn.Embedding) and last == "weight":
        raise LitPeftError(
            f"{start}, the weight of a {type(owner).__name__}: name the module in target_modules instead, e.g. "
            f"target_modules=[{path.rpartition('.')[2]!r}]."
        )
    if isinstance(parameter, QuantizedWeight):
        return
    if not parameter.is_floating_point() or type(parameter.data) not in (Tensor, nn.Parameter):
        raise LitPeftError(f"{start}, which is quantized: load the base without quantization to adapt it.")
    if not path or isinstance(owner, _HAVE_LAYERS) or parameter.dim() not in (2, 3):
        raise LitPeftError(
            f"{start}, of shape {tuple(parameter.shape)} in a {type(owner).__name__}: only stacked matrices of experts "
            "and matrices of modules that are no layers of torch can be adapted."
        )


def _no_match(model: nn.Module, target: str, parameters: Mapping[str, Tensor], source: str) -> str:
    last = target.rpartition(".")[2]
    inside = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
    if inside:
        own = sorted(name for name, _ in model.get_submodule(inside[0]).named_parameters())
        advice = f"{inside[0]} is a module; its parameters are {', '.join(own[:4])}"
    else:
        known = {name.rpartition(".")[2] for name in (*stacked_experts(model), *quantized_experts(model))} or {
            name.rpartition(".")[2] for name, parameter in parameters.items() if parameter.dim() in (2, 3)
        }
        advice = f"the closest are {closest(last, sorted(known))}"
    return f"{source}target_parameters has {target!r}, which names no parameter of {type(model).__name__}: {advice}."
