"""`model.adapter`: a run that starts from the trained weights in an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_peft.formats.folder import load_adapter
from lit_peft.methods.attach import detach
from lit_peft.methods.attachment import MethodSettings, attachment_of
from lit_peft.nn.prompt import PromptEncoder
from lit_peft.training.run_record import say
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

# Settings of training, which may be others than those that the folder's adapter was trained with.
_OF_TRAINING = {"lora_dropout", "dropout", "encoder_dropout", "loraplus_lr_ratio"}
# Settings of how new weights begin, which have no effect here.
_OF_START = {
    *("init_lora_weights", "init_weights", "init_std"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "prompt_tuning_init_labels", "tokenizer_name_or_path"),
}
# Settings that select layers, in one way or another: what they select is compared.
_OF_PLACE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Those of parts that the model may not have, and of the network that computes P-Tuning's tokens, which is not saved.
_WITHOUT_EFFECT = {
    *("encoder_prefix", "cross_prefix"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers"),
}


def attach_from_folder(module: Any, model: nn.Module, head: list[str]) -> None:
    """Attach a module's method to a model, with the weights in the folder that `model.adapter` names.

    Settings of the module that are unset (None) are taken from the folder and recorded in its hyper-parameters.

    Args:
        module: the module.
        model: the frozen model; on the meta device only the settings are checked.
        head: names of the task's modules and parameters, which are trained in full. Those that are not in the folder
            begin anew, which is said.

    Raises:
        LitPeftError: the folder has another method, other settings, or the adapter of another base.
    """
    folder = Path(module.hparams.adapter)
    empty = any(parameter.is_meta for parameter in model.parameters())
    load_adapter(model, folder, check_base=not empty)
    attachment = attachment_of(model)
    stored = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    settings = _matching(module.settings, attachment.settings, folder)
    detach(model)
    module.settings = settings
    module.hparams.update({field.name: getattr(settings, field.name) for field in fields(settings)})
    module.attach_method(model, head)
    fold_prompts(model)
    attachment_of(model).started_from = folder.resolve().name
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    new = [name for name in trained if name not in stored]
    outside = [name for name in new if not any(name == part or name.startswith(f"{part}.") for part in head)]
    differing = [name for name in stored if name not in trained or trained[name].shape != stored[name].shape]
    for name in (*differing, *outside):
        there, here = (tuple(found[name].shape) if name in found else "not there" for found in (stored, trained))
        raise LitPeftError(
            f"model.adapter={str(folder)!r} does not fit: {name} is {there} in the folder and {here} in this module; "
            f"give the settings and the labels that the adapter was trained with."
        )
    with torch.no_grad():
        for name, value in stored.items():
            trained[name].copy_(value)
    if new and not empty:
        names = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        say(f"{names} not in the adapter's folder, so trained from the start", "adapter:")


def fold_prompts(model: nn.Module) -> None:
    """Train the virtual tokens of P-Tuning themselves: a folder has them without the network that computed them."""
    for prompt in attachment_of(model).adapted.values():
        if isinstance(prompt, PromptEncoder):
            prompt.fold()


def check_start(module: Any, path: Any, checkpoint: Mapping[str, Any] | None = None) -> None:
    """Check that a run whose `model.adapter` does not exist any more needs nothing of it.

    Args:
        module: the module.
        path: the checkpoint that is loaded; None: none is.
        checkpoint: its content.

    Raises:
        LitPeftError: no checkpoint is loaded, or settings that were taken from the folder are not given.
    """
    folder = module.hparams.adapter
    if folder is None or Path(folder).is_dir():
        return
    if checkpoint is None:
        raise LitPeftError(f"model.adapter={folder!r} does not exist: give the folder of an adapter.")
    before = checkpoint.get("hyper_parameters") or {}
    names = [field.name for field in fields(module.settings)]
    taken = [name for name in names if getattr(module.settings, name) is None and before.get(name) is not None]
    if taken:
        given = ", ".join(f"model.{name}={brief(before[name])}" for name in taken)
        raise LitPeftError(
            f"model.adapter={folder!r} does not exist any more, and the run of {path} took settings from it: give "
            f"{given}."
        )


def _matching(own: MethodSettings, stored: MethodSettings, folder: Path) -> MethodSettings:
    """Return the module's settings, completed by those of the folder.

    Raises:
        LitPeftError: they differ; the message names the first that does, and how to give all.
    """
    if type(own) is not type(stored):
        raise LitPeftError(
            f"model.adapter={str(folder)!r} is an adapter of {type(stored).__name__.removesuffix('Settings')}, and the "
            f"module is {type(own).__name__.removesuffix('Settings')}: give --model "
            f"{type(stored).__name__.removesuffix('Settings')}."
        )
    taken: dict[str, Any] = {}
    differing: list[str] = []
    places = [name for name in _OF_PLACE if hasattr(own, name)]
    if not any(getattr(own, name) for name in places):
        taken = {name: getattr(stored, name) for name in places}
    for field in fields(own):
        name, mine, theirs = field.name, getattr(own, field.name), getattr(stored, field.name)
        if name in _OF_START:
            if mine != field.default:
                raise LitPeftError(
                    f"model.{name}={brief(mine)} is how new weights begin, and model.adapter gives trained ones: leave "
                    f"{name} out."
                )
        elif name in (*_OF_TRAINING, *_WITHOUT_EFFECT, *places, "modules_to_save") or _same(mine, theirs):
            continue
        elif mine is None:
            taken[name] = theirs
        else:
            differing.append(name)
    if differing:
        first = differing[0]
        options = " ".join(f"--model.{name} {brief(getattr(stored, name))}" for name in differing)
        raise LitPeftError(
            f"model.{first} is {brief(getattr(own, first))}, and the adapter in model.adapter={str(folder)!r} has "
            f"{brief(getattr(stored, first))}: give {options}."
        )
    if own.modules_to_save is None and stored.modules_to_save:
        taken["modules_to_save"] = list(stored.modules_to_save)
    return replace(own, **taken)


def _same(one: Any, other: Any) -> bool:
    """Return whether two values of a setting mean the same: the order of names does not matter."""
    names = [value for value in (one, other) if isinstance(value, (list, tuple, set)) and not isinstance(value, str)]
    if len(names) == 2 and all(isinstance(name, str) for value in names for name in value):
        return set(one) == set(other)
    return bool(one == other) or (not one and not other and type(one) is not bool and type(other) is not bool)
