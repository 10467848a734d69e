"""Which modules of a model a method adapts: names, suffixes, regular expressions, layer numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from lit_peft.errors import LitPeftError, closest

_DEFAULT_ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
)
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out", "cls", "classification_head")


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by a weight: `nn.Linear`, its subclasses, transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")


def default_targets(model: nn.Module) -> list[str]:
    """The names of the query and value projections, or of the fused one, in this model.

    Raises:
        LitPeftError: no attention projection of a known name is there.
    """
    suffixes = {name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)}
    for names in _DEFAULT_ATTENTION:
        if suffixes.issuperset(names):
            return list(names)
    raise LitPeftError(
        "target_modules is not set and no attention projection of a known name was found: name the modules, e.g. "
        f"target_modules={sorted(suffixes)[:3]}, or use target_modules='all-linear'."
    )


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> list[str]:
    """Return the full names of the modules to adapt, in the model's order.

    Args:
        model: the model to search.
        target_modules: a list of names (a module matches by its whole name or its last parts), a regular expression
            the whole name must match, or `"all-linear"` (each linear layer but the output head).
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: keep only modules in layers of these numbers, counted from 0.
        layers_pattern: the name of the list of layers, e.g. `"layers"`; any numbered one when None.
        modules_to_save: modules trained in full, which are left out with everything in them.

    Raises:
        LitPeftError: nothing matches; the message names the closest modules there are.
    """
    adaptable = {
        name: module
        for name, module in model.named_modules()
        if name and (is_linear(module) or isinstance(module, nn.Embedding))
    }
    last_parts = [name.rpartition(".")[2] for name in adaptable]
    if target_modules == "all-linear":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        found = [
            name
            for name, module in adaptable.items()
            if is_linear(module) and module is not output and not set(name.split(".")) & set(_HEADS)
        ]
    else:
        found = [name for name in adaptable if _matches(name, target_modules)]
        wanted = [] if isinstance(target_modules, str) else target_modules
        for target in wanted:
            if not any(_matches(name, [target]) for name in adaptable):
                raise LitPeftError(
                    f"target_modules names {target!r}, and {type(model).__name__} has no linear or embedding module "
                    f"of that name: the closest are {closest(target.rpartition('.')[2], last_parts)}."
                )
    if exclude_modules:
        found = [name for name in found if not _matches(name, exclude_modules)]
    if modules_to_save:
        found = [name for name in found if not any(_within(name, saved) for saved in modules_to_save)]
    if layers_to_transform is not None:
        numbers = set(layers_to_transform)
        found = [name for name in found if _layer_of(name, layers_pattern) in numbers]
    if not found:
        raise LitPeftError(
            f"target_modules={target_modules!r} (exclude_modules={exclude_modules!r}, "
            f"layers_to_transform={layers_to_transform!r}) matches no module of {type(model).__name__}: the closest "
            f"are {closest(str(target_modules), last_parts)}."
        )
    return found


def check_leave_out(leave_out: Sequence[int], count: int) -> None:
    """Check the numbers of the layers to leave out against the number of layers.

    Raises:
        LitPeftError: one names no layer.
    """
    unknown = [number for number in leave_out if not 0 <= number < count]
    if unknown:
        raise LitPeftError(f"leave_out={list(leave_out)} names {unknown}, and the model's layers are 0 to {count - 1}.")


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern (a regular expression for the name's end) that fits the module's name."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _matches(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == target or name.endswith("." + target) for target in wanted)


def _within(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


def _layer_of(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    for pattern in patterns or [r"[^.]+"]:
        match = re.match(rf"(?:.*?\.)??{pattern}\.(\d+)(?:\.|$)", name)
        if match:
            return int(match.group(1))
    return None
