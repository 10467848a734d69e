"""Which modules of a model a method adapts: names, suffixes, regular expressions, layer numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lit_peft.nn.linear import stores_transposed
from lit_peft.util.errors import LitPeftError, closest, first_line
from lit_peft.util.type_checks import brief

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
    return isinstance(module, nn.Linear) or stores_transposed(module)


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
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    strict: bool = True,
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
        strict: refuse each name, pattern and number that matches nothing in the model; else only what leaves no module
            to adapt, as peft does.

    Raises:
        LitPeftError: something matches nothing; the message names the closest there is.
    """
    adaptable = {
        name: module
        for name, module in model.named_modules()
        if name and (is_linear(module) or isinstance(module, nn.Embedding))
    }
    numbers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    if strict:
        _check_names(model, "target_modules", [] if isinstance(target_modules, str) else target_modules, adaptable)
        _check_names(model, "exclude_modules", exclude_modules or [], adaptable)
        _check_layers(model, numbers, layers_pattern, adaptable)
    if target_modules == "all-linear":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        found = [
            name
            for name, module in adaptable.items()
            if is_linear(module) and module is not output and not set(name.split(".")) & set(_HEADS)
        ]
    else:
        found = _matching(target_modules, adaptable)
    excluded = set(_matching(exclude_modules, adaptable) if exclude_modules else ())
    found = [name for name in found if name not in excluded]
    if modules_to_save:
        found = [name for name in found if not any(_within(name, saved) for saved in modules_to_save)]
    if numbers is not None:
        found = [name for name in found if _layer_of(name, layers_pattern) in numbers]
    if not found:
        raise LitPeftError(
            f"target_modules={target_modules!r} (exclude_modules={exclude_modules!r}, "
            f"layers_to_transform={layers_to_transform!r}) matches no module of {type(model).__name__}: "
            f"{_advice(target_modules, adaptable)}."
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


def pattern_values(patterns: Mapping[str, float], names: Sequence[str], default: float) -> dict[str, float]:
    """The value of each name: that of the first pattern that fits it, else the default."""
    first = first_fitting(patterns, names)
    return {name: patterns[first[name]] if name in first else default for name in names}


def first_fitting(patterns: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """The first of the patterns (regular expressions for a name's end) that fits each name; names that none fits are
    left out."""
    # Compiled here: `re` keeps fewer than a large model has modules.
    compiled = [(pattern, re.compile(rf"(.*\.)?({pattern})")) for pattern in patterns]
    found = {name: next((own for own, expression in compiled if expression.fullmatch(name)), None) for name in names}
    return {name: pattern for name, pattern in found.items() if pattern is not None}


def check_patterns(field: str, patterns: Mapping[str, float], adapted: Sequence[str]) -> None:
    """Check that each of the patterns for `pattern_values` gives some adapted module its value.

    Raises:
        LitPeftError: one fits no adapted module, or only such as an earlier one fits.
    """
    used = set(first_fitting(patterns, adapted).values())
    for pattern in (pattern for pattern in patterns if pattern not in used):
        if first_fitting([pattern], adapted):
            raise LitPeftError(
                f"{field} has {pattern!r} after patterns that fit all its modules: the first that fits counts, so put "
                "it in front of them, or leave it out."
            )
        ends = [name.rpartition(".")[2] for name in adapted]
        raise LitPeftError(
            f"{field} has {pattern!r}, which fits no module that is adapted: the closest are "
            f"{closest(pattern.rpartition('.')[2], ends)}."
        )


def check_expression(field: str, pattern: str) -> None:
    """Raise `LitPeftError` if a setting is not a valid regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise LitPeftError(f"{field} has the regular expression {brief(pattern)}: {first_line(problem)}.") from None


def _matching(wanted: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that a regular expression matches whole, or whose last parts are in a list."""
    if isinstance(wanted, str):
        return [name for name in names if re.fullmatch(wanted, name)]
    listed = set(wanted)
    return [name for name in names if not listed.isdisjoint(_ends(name))]


def _ends(name: str) -> list[str]:
    """The whole name and each end of it: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def _check_names(model: nn.Module, field: str, wanted: str | Sequence[str], names: Iterable[str]) -> None:
    if isinstance(wanted, str):
        if not _matching(wanted, names):
            raise LitPeftError(
                f"{field}={wanted!r} matches no module of {type(model).__name__}: {_advice(wanted, names)}."
            )
        return
    ends = {end for name in names for end in _ends(name)}
    for name in wanted:
        if name not in ends:
            raise LitPeftError(
                f"{field} names {name!r}, and {type(model).__name__} has no linear or embedding module of that name: "
                f"{_advice([name], names)}."
            )


def _advice(wanted: str | Sequence[str], names: Iterable[str]) -> str:
    """What to write in the place of names or a regular expression that match nothing."""
    last = [name.rpartition(".")[2] for name in names]
    if isinstance(wanted, str) and _matching([wanted], names):
        return f"a text is a regular expression for the whole name, so give a list, [{wanted!r}]"
    first = wanted if isinstance(wanted, str) else next(iter(wanted), "")
    return f"the closest are {closest(first.rpartition('.')[2], last)}"


def _check_layers(
    model: nn.Module,
    numbers: Sequence[int] | None,
    layers_pattern: str | Sequence[str] | None,
    names: Iterable[str],
) -> None:
    if numbers is None:
        if layers_pattern:
            raise LitPeftError(
                f"layers_pattern={layers_pattern!r} says where the layers of layers_to_transform are, which is not "
                "set: give their numbers, or leave both out."
            )
        return
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or ():
        if all(_layer_of(name, pattern) is None for name in names):
            lists = {before for name in names for before, _ in re.findall(r"([^.]+)\.(\d+)(?=\.|$)", name)}
            raise LitPeftError(
                f"layers_pattern names {pattern!r}, and {type(model).__name__} has no list of layers of that name: the "
                f"closest are {closest(pattern, sorted(lists))}."
            )
    existing = {number for name in names if (number := _layer_of(name, layers_pattern)) is not None}
    unknown = [number for number in numbers if number not in existing]
    if unknown:
        there = f"{min(existing)} to {max(existing)}" if existing else "not numbered"
        raise LitPeftError(
            f"layers_to_transform names {', '.join(map(str, unknown[:5]))}, and the layers of "
            f"{type(model).__name__} are {there}: name some of those."
        )


def _within(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


def _layer_of(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    for pattern in patterns or [r"[^.]+"]:
        match = re.match(rf"(?:.*?\.)??{pattern}\.(\d+)(?:\.|$)", name)
        if match:
            return int(match.group(1))
    return None
