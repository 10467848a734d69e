"""Which modules of a model a method adapts: names, suffixes, regular expressions, layer numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lit_peft.models.experts import experts_left_out, quantized_experts, stacked_experts
from lit_peft.models.towers import TOWERS, language_path, tower_of, towers, unread_by
from lit_peft.models.transformers_internals import is_model_of, returns_its_product
from lit_peft.nn.linear import stores_transposed
from lit_peft.nn.torch_internals import weights_read_by
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.expressions import Expressions, check_expression

__all__ = [
    "among",
    "check_expression",
    "check_leave_out",
    "default_targets",
    "find_targets",
    "is_linear",
    "keep_layers",
]

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
    ("Wq", "Wv"),
    ("project_q", "project_v"),
    ("q_proj", "v_proj_current", "v_proj_delayed"),
    ("q_proj.linear", "v_proj.linear"),
    ("q_head", "v_head"),
    # Latent attention: what expands the latent vectors to queries, and to keys and values.
    ("q_b_proj", "kv_b_proj"),
    ("q_proj", "kv_b_proj"),
    ("q_b_proj", "kv_proj"),
    ("q_gate_proj", "kv_b_proj"),
    ("kv_proj",),
    # Models of state-space layers alone. Their other projection is not called where a fused kernel runs.
    ("in_proj",),
)
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out", "cls", "classification_head")
_HEADS_WITHOUT_POOLER = tuple(
    f"AutoModelFor{head}" for head in ("CausalLM", "MaskedLM", "TokenClassification", "QuestionAnswering")
)
# How the configurations begin that a model has for images and sound.
_SENSES = ("vision", "audio", "image", "speech", "video")
# What surrounds a pattern of `layers_pattern`.
_BEFORE_LIST, _AFTER_LIST = r"(?:.*?\.)??", r"\.(?P<found>\d+)(?:\..*)?"


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by a weight: `nn.Linear`, its subclasses, transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or stores_transposed(module)


def is_linear_or_embedding(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or an embedding."""
    return is_linear(module) or isinstance(module, nn.Embedding)


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of the query and value projections, or of the one that computes both.

    In a model that combines a language model with others (vision, audio), these are the language model's. The names
    are full names if modules outside of the language model are called the same.

    Raises:
        LitPeftError: the model has no attention projection of a known name.
    """
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    language = f"{path}." if (path := language_path(model)) else ""
    others = _other_models(model)
    inside = [
        name
        for name in linear
        if f"{name}.".startswith(language) and not name.startswith(others) and "indexer" not in name.split(".")
    ]
    ends = {end for name in inside for end in _ends(name)}
    for names in _DEFAULT_ATTENTION:
        if ends.issuperset(names):
            found = _matching(names, linear, "")
            targets = [name for name in found if name in inside]
            return list(names) if found == targets else targets
    some = sorted({name.rpartition(".")[2] for name in inside})[:3]
    raise LitPeftError(
        "target_modules is not set and no attention projection of a known name was found: name the modules, e.g. "
        f"target_modules={some}, or use target_modules='all-linear'."
    )


def _other_models(model: nn.Module) -> tuple[str, ...]:
    """The paths, each ending in a dot, of the models in a language model that read images and sound (Phi-4)."""
    config: Any = getattr(model, "config", None)
    # Not the parts of a language model that is built of several (BLT).
    names = [name for name in getattr(config, "sub_configs", None) or {} if name.startswith(_SENSES)]
    text = config.get_text_config() if names else None
    others = {id(found) for name in names if (found := getattr(config, name, None)) not in (None, text)}
    return tuple(f"{path}." for path, module in model.named_modules() if id(getattr(module, "config", None)) in others)


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    strict: bool = True,
    source: str = "",
    with_experts: bool = False,
    can_adapt: Callable[[nn.Module], bool] = is_linear_or_embedding,
) -> list[str]:
    """Return the full names of the modules to adapt, in the model's order.

    Args:
        model: the model to search.
        target_modules: a list of names (a module matches by its full name or the last parts of it), a regular
            expression for the full name, or `"all-linear"` (each linear layer except the output head and those whose
            adapter would have no effect). In a model that reads images, `"language"`, `"vision"`, `"projector"` and
            `"all"` stand for the same of these parts, also in a list.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: indices of the layers to adapt, starting at 0.
        layers_pattern: the name of the list of layers, e.g. `"layers"`; any list when None.
        modules_to_save: modules that are trained in full; they are left out with all modules inside them.
        strict: refuse each name, pattern and index that matches nothing. Otherwise, refuse only settings that leave
            no module to adapt, as peft does.
        source: the file that the settings come from, to begin messages with, e.g. `"adapter_config.json: "`.
        with_experts: whether experts that are stored as one parameter are adapted as well. Otherwise a warning says
            that they are not, where they might be expected.
        can_adapt: which modules the method can adapt.

    Raises:
        LitPeftError: a setting matches nothing (the message names the closest modules), or a named module could not
            be adapted, or the adapter would have no effect.
    """
    adaptable = {name: module for name, module in model.named_modules() if name and can_adapt(module)}
    target_modules = _with_towers(model, target_modules, adaptable)
    indices = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    lists = _Lists(layers_pattern, source)
    if strict:
        _check_names(model, "target_modules", [] if isinstance(target_modules, str) else target_modules, adaptable)
        _check_names(model, "exclude_modules", exclude_modules or [], adaptable)
        _check_layers(model, indices, lists, adaptable)
    if target_modules == "all-linear":
        found = _all_linear(model, adaptable)
    else:
        found = _matching(target_modules, adaptable, f"{source}target_modules")
    # A regular expression may match the projection inside of an attention that is adapted as a whole.
    whole = tuple(f"{name}." for name in found if isinstance(adaptable[name], nn.MultiheadAttention))
    found = [name for name in found if not name.startswith(whole)] if whole else found
    excluded = set(_matching(exclude_modules, adaptable, f"{source}exclude_modules") if exclude_modules else ())
    found = [name for name in found if name not in excluded]
    if modules_to_save:
        found = [name for name in found if not any(_within(name, saved) for saved in modules_to_save)]
    if indices is not None:
        found = [name for name in found if lists.index(name) in indices]
    if not found:
        raise LitPeftError(
            f"{source}target_modules={target_modules!r} (exclude_modules={exclude_modules!r}, "
            f"layers_to_transform={layers_to_transform!r}) matches no module of {type(model).__name__}: "
            f"{_advice(model, target_modules, adaptable)}."
        )
    for name in found:
        obstacle = _obstacle(model, name)
        if obstacle is not None:
            raise LitPeftError(
                f"{source}target_modules={target_modules!r} includes {name}, {obstacle}: leave it out, e.g. with "
                f"exclude_modules=[{name.rpartition('.')[2]!r}]."
            )
    if not with_experts and (target_modules == "all-linear" or _names_experts(model, target_modules)):
        _warn_of_experts(model)
    return found


def _all_linear(model: nn.Module, adaptable: Mapping[str, nn.Module]) -> list[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return [
        name
        for name, module in adaptable.items()
        if is_linear(module)
        and module is not output
        and not set(name.split(".")) & set(_HEADS)
        and _obstacle(model, name) is None
    ]


def _with_towers(
    model: nn.Module, target_modules: str | Sequence[str], adaptable: Mapping[str, nn.Module]
) -> str | list[str] | Sequence[str]:
    """Replace the names of parts of a model that reads images by the names of their linear layers."""
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    wanted = [name for name in names if name in TOWERS]
    parts = towers(model) if wanted else {}
    if not parts:
        return target_modules
    unread = unread_by(model, parts)
    place = {name: tower_of(name, parts) for name in _all_linear(model, adaptable) if not name.startswith(unread)}
    for part in wanted:
        if part != "all" and part not in place.values():
            raise LitPeftError(
                f"target_modules={target_modules!r} names {part!r}, but {type(model).__name__} has no linear layers "
                f"there: use {closest(part, sorted(set(filter(None, place.values()))))}."
            )
    chosen = [name for name, part in place.items() if part in wanted or (part is not None and "all" in wanted)]
    return [*chosen, *(name for name in names if name not in wanted)]


def _obstacle(model: nn.Module, name: str) -> str | None:
    """Why an adapter on a linear layer would fail or have no effect; None if it would work."""
    module = model.get_submodule(name)
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    config: Any = getattr(model, "config", None)
    if last in weights_read_by(owner):
        return (
            f"whose weight {type(owner).__name__} uses without calling the layer, so an adapter on it would have no "
            "effect"
        )
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1 and "dense" in last:
        return "which BLOOM does not call with slow_but_exact=True, so an adapter on it would have no effect"
    parts = name.split(".")
    if "indexer" in parts:
        return "which only selects tokens for the attention, so an adapter on it would get no gradient"
    if "pooler" in parts and any(is_model_of(head, model) for head in _HEADS_WITHOUT_POOLER):
        return f"whose output the head of {type(model).__name__} does not use, so an adapter on it would have no effect"
    if isinstance(module, nn.Linear) and not returns_its_product(module):
        return f"a {type(module).__name__} that does not return one tensor of its {module.out_features} outputs"
    return None


def _names_experts(model: nn.Module, target_modules: str | Sequence[str]) -> bool:
    """Whether a list of names would include a mixture's experts if these were linear layers, e.g. `down_proj`."""
    if isinstance(target_modules, str):
        return False
    experts = (*stacked_experts(model), *quantized_experts(model))
    parts = {part for name in experts for part in name.rpartition(".")[2].split("_")}
    return any(name.rpartition(".")[2].removesuffix("_proj") in parts - {"proj"} for name in target_modules)


def _warn_of_experts(model: nn.Module) -> None:
    about = experts_left_out(model)
    if about is not None:
        warnings.warn(
            f"{about}: target_modules cannot reach them, so they stay frozen without adapters. To adapt them too, set "
            "target_experts=True (LoRA only).",
            stacklevel=5,
        )


def among(paths: Sequence[str], names: str | Sequence[str], field: str) -> set[str]:
    """Return those of the adapted modules that a further setting selects: names, or a regular expression.

    Args:
        paths: the full names of the adapted modules.
        names: the value of the setting.
        field: its name, for messages.

    Raises:
        LitPeftError: a name or the regular expression matches none of the modules.
    """
    for name in [names] if isinstance(names, str) else names:
        if not _matching(names if isinstance(names, str) else [name], paths, field):
            last = [path.rpartition(".")[2] for path in paths]
            raise LitPeftError(
                f"{field} has {name!r}, which matches none of the modules that target_modules selects: the closest "
                f"are {closest(name.rpartition('.')[2], last)}."
            )
    return set(_matching(names, paths, field))


def check_leave_out(leave_out: Sequence[int], count: int) -> None:
    """Check the indices of the layers to leave out against the number of layers.

    Raises:
        LitPeftError: an index is out of range.
    """
    unknown = [index for index in leave_out if not 0 <= index < count]
    if unknown:
        raise LitPeftError(
            f"leave_out={list(leave_out)} includes {unknown}, but the model's layers are 0 to {count - 1}."
        )


def _matching(targets: str | Sequence[str], names: Iterable[str], field: str) -> list[str]:
    """The names that a regular expression matches, or whose last parts are in a list."""
    if isinstance(targets, str):
        expressions = Expressions(field)
        return [name for name in names if expressions.fullmatch(targets, name)]
    listed = set(targets)
    return [name for name in names if not listed.isdisjoint(_ends(name))]


def _ends(name: str) -> list[str]:
    """The full name and its last parts: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _check_names(model: nn.Module, field: str, targets: str | Sequence[str], names: Iterable[str]) -> None:
    if isinstance(targets, str):
        if not _matching(targets, names, field):
            raise LitPeftError(
                f"{field}={targets!r} matches no module of {type(model).__name__}: {_advice(model, targets, names)}."
            )
        return
    ends = {end for name in names for end in _ends(name)}
    for name in targets:
        if name not in ends:
            raise LitPeftError(
                f"{field} has {name!r}, but {type(model).__name__} has no layer of that name that can be adapted: "
                f"{_advice(model, [name], names)}."
            )


def _advice(model: nn.Module, targets: str | Sequence[str], names: Iterable[str]) -> str:
    """What to write instead of names or a regular expression that match nothing."""
    last = [name.rpartition(".")[2] for name in names]
    if isinstance(targets, str) and _matching([targets], names, ""):
        return f"a string is a regular expression for the full name, so give a list, [{targets!r}]"
    first = targets if isinstance(targets, str) else next(iter(targets), "")
    advice = f"the closest are {closest(first.rpartition('.')[2], last)}"
    if not isinstance(targets, str) and _names_experts(model, targets):
        advice += f"; {experts_left_out(model)}"
    return advice


def keep_layers(
    names: Iterable[str], layers_to_transform: int | Sequence[int] | None, layers_pattern: Any, source: str
) -> list[str]:
    """Return the names that are in the layers of the given indices; all of them if there are none."""
    indices = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    lists = _Lists(layers_pattern, source)
    return [name for name in names if indices is None or lists.index(name) in indices]


class _Lists:
    """The lists of layers that `layers_pattern` names, or any."""

    def __init__(self, layers_pattern: str | Sequence[str] | None, source: str) -> None:
        self.patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
        self.expressions = Expressions(f"{source}layers_pattern")

    def index(self, name: str, pattern: str | None = None) -> int | None:
        """The index of the layer that a module is in; None if it is in none of the lists."""
        for own in [pattern] if pattern is not None else self.patterns or [r"[^.]+"]:
            found = self.expressions.group(own, name, _BEFORE_LIST, _AFTER_LIST)
            if found is not None:
                return int(found)
        return None


def _check_layers(model: nn.Module, indices: Sequence[int] | None, lists: _Lists, names: Iterable[str]) -> None:
    if indices is None:
        if lists.patterns:
            raise LitPeftError(
                f"layers_pattern={lists.patterns} has no effect without layers_to_transform: give the indices of the "
                "layers, or leave layers_pattern out."
            )
        return
    for pattern in lists.patterns:
        if all(lists.index(name, pattern) is None for name in names):
            existing = {before for name in names for before, _ in re.findall(r"([^.]+)\.(\d+)(?=\.|$)", name)}
            raise LitPeftError(
                f"layers_pattern has {pattern!r}, but {type(model).__name__} has no list of layers of that name: the "
                f"closest are {closest(pattern, sorted(existing))}."
            )
    known = {index for name in names if (index := lists.index(name)) is not None}
    unknown = [index for index in indices if index not in known]
    if unknown:
        there = f"{min(known)} to {max(known)}" if known else "not numbered"
        raise LitPeftError(
            f"layers_to_transform has {', '.join(map(str, unknown[:5]))}, but the layers of {type(model).__name__} are "
            f"{there}."
        )


def _within(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."
