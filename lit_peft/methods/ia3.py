"""(IA)³ (Liu et al. 2022, arXiv:2205.05638): settings, and which layers are adapted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.methods.targets import among, check_expression, find_targets, is_linear
from lit_peft.models.architectures import Layer, layer_stacks
from lit_peft.models.experts import experts_left_out
from lit_peft.nn.ia3 import IA3Linear
from lit_peft.util.errors import LitPeftError

# Of the projections that the architectures list, those that compute neither keys nor values.
_QUERIES = {"q", "q_b_proj", "q_lin", "q_proj", "query", "query_proj", "project_q", "Wq"}


@dataclass(frozen=True)
class IA3Settings(MethodSettings):
    """Settings of (IA)³: `l ⊙ (W x + b)` for keys and values, and `W (l ⊙ x) + b` for FFNs (section 3.3).

    Args:
        target_modules: the linear layers to adapt: a list of names, a regular expression, or `"all-linear"`. None
            selects the projections to keys and values (or the one that computes them with the queries), in
            cross-attention too, and the output layer of each FFN.
        feedforward_modules: which of these have their input scaled rather than their output: names or a regular
            expression. None selects the output layers of the FFNs of models whose layers are known, and an empty list
            none.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: indices of the layers to adapt, counted from 0. None adapts all layers.
        layers_pattern: name of the model's list of layers.

    Raises:
        LitPeftError: a setting is invalid.
    """

    method: ClassVar[str] = "ia3"
    # Section 3.5 of the paper.
    learning_rate: ClassVar[float] = 3e-3
    target_modules: str | Sequence[str] | None = None
    feedforward_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "feedforward_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name) or ()
            # A list of modules holds names, not regular expressions.
            for pattern in [value] if isinstance(value, str) else value if name == "layers_pattern" else ():
                check_expression(name, pattern)

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Wrap each target in a layer that scales its input or output.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: a setting matches nothing in the model, or a layer cannot be adapted.
        """
        outputs = _ffn_outputs(model)
        targets = self.target_modules
        if targets is None:
            targets = _default_targets(model, outputs)
        paths = find_targets(
            model,
            targets,
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
            self.modules_to_save,
            can_adapt=is_linear,
        )
        if self.feedforward_modules is None:
            feedforward = outputs
        else:
            feedforward = among(paths, self.feedforward_modules, "feedforward_modules")
        for path in paths:
            attachment.replace(path, IA3Linear(model.get_submodule(path), path in feedforward))


def _default_targets(model: nn.Module, outputs: set[str]) -> list[str]:
    """Return the full names of the projections to keys and values and of the output layers of the FFNs."""
    keys_and_values = [path for layer in _layers(model) for path in _linears(model, layer, _keys_and_values(layer))]
    found = list(dict.fromkeys([*keys_and_values, *outputs]))
    if not found:
        raise LitPeftError(
            f"target_modules is not set, and the projections to keys and values and the feed-forward networks of "
            f"{type(model).__name__} are not known: name the layers, e.g. target_modules=['k_proj', 'v_proj', "
            "'down_proj'] with feedforward_modules=['down_proj']."
        )
    experts = experts_left_out(model)
    if experts is not None:
        warnings.warn(
            f"{experts}: (IA)³ cannot reach them, so they stay frozen without vectors. The projections to keys and "
            "values and other feed-forward networks are adapted.",
            stacklevel=5,
        )
    return found


def _ffn_outputs(model: nn.Module) -> set[str]:
    """Return the full names of the last linear layers of the feed-forward networks; none where they are not known."""
    return {path for layer in _layers(model) for path in _linears(model, layer, layer.architecture.ffn_linears)[-1:]}


def _layers(model: nn.Module) -> list[Layer]:
    try:
        return [layer for stack in layer_stacks(model) for layer in stack]
    except LitPeftError:
        return []


def _keys_and_values(layer: Layer) -> list[str]:
    """Return the projections, by their paths in a layer, that compute keys or values. The layer need not have all."""
    architecture = layer.architecture
    found = [path for path in architecture.qkv_linears if path.rpartition(".")[2] not in _QUERIES]
    cross = architecture.cross_attention
    return found if cross is None else [*found, *(f"{cross}.{path.rpartition('.')[2]}" for path in found)]


def _linears(model: nn.Module, layer: Layer, names: Sequence[str]) -> list[str]:
    """Return the full names of those modules of a layer that are there and are linear."""
    inside = {name for name, module in layer.module.named_modules() if is_linear(module)}
    return [f"{layer.path}.{name}" for name in names if name in inside]
