"""`load_adapter` and `save_adapter`: recognizing a folder's format, and writing a folder completely or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import nn

from lit_peft.formats import adapterhub, base_record, own, peft
from lit_peft.formats.card import stacked_on, write_card
from lit_peft.formats.files import read_extra, write_extra
from lit_peft.formats.untrusted import read_json
from lit_peft.methods.adapter_dtype import use_base_dtype
from lit_peft.methods.adapters import adapter_names, new_adapter
from lit_peft.methods.attachment import Attachment, Model, attachment_of
from lit_peft.methods.together import Together
from lit_peft.nn.finite import non_finite_names
from lit_peft.util.disk import whole_folder, write_failure
from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

# Key of a folder's `lit_peft.json`: the names of the adapters that this one was stacked on.
BELOW = "stacked_on"


def load_adapter(
    model: Model,
    folder: str | Path,
    check_base: bool = True,
    name: str | None = None,
    with_head: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
) -> Model:
    """Attach the adapter in a folder to a model, ready for `model.eval()`.

    Args:
        model: the base model, as transformers loaded it.
        folder: the adapter's folder, in the format of peft or AdapterHub.
        check_base: refuse a model that is not the base the adapter was trained on, if the folder says which it was.
        name: the adapter's name. It is loaded beside the adapters that the model already has, and becomes the active
            one. When None, the model must be bare.
        with_head: also load what the folder has of `modules_to_save`, e.g. a head. Without, a bottleneck adapter can be
            loaded into a model with another head, to stack a task's adapter on it.
        key_mapping: for a peft folder of a model whose modules have other names: regular expressions for the names of
            its tensors, without `base_model.model.`, and what replaces their matches. The first that matches counts.
        low_cpu_mem_usage: use the folder's tensors of a LoRA themselves, rather than to initialize others and to copy.
        autocast_adapter_dtype: see `attach`.

    Returns:
        The same model, with the adapter attached.

    Raises:
        LitPeftError: the model is not the adapter's base, a file is missing, the method or a setting is not supported,
            or the tensors do not fit the model. The model is left as it was.
    """
    folder = Path(folder)
    if name is not None:
        with new_adapter(model, name):
            return load_adapter(
                model,
                folder,
                check_base,
                with_head=with_head,
                key_mapping=key_mapping,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
    config = _read_config(folder)
    below = read_extra(folder).get(BELOW)
    if isinstance(below, list) and not adapter_names(model):
        warnings.warn(
            f"{folder} was trained stacked on {brief(below)}, which this model does not have: load that adapter first, "
            "then call lit_peft.set_adapter with a lit_peft.Stack (in a run: model.stack).",
            stacklevel=2,
        )
    if check_base:
        base_record.check_base(model, folder, any_class=not with_head)
    if not with_head and ("peft_type" in config or "config" not in config):
        raise LitPeftError(
            f"with_head=False needs a folder in AdapterHub's format, which all bottleneck adapters have, and {folder} "
            "has another one: leave with_head out."
        )
    for given, value in (("key_mapping", key_mapping), ("low_cpu_mem_usage", low_cpu_mem_usage)):
        supported = "peft_type" in config and (given == "key_mapping" or config["peft_type"] == "LORA")
        if value and not supported:
            which = "a LoRA's folder in peft's format" if given == "low_cpu_mem_usage" else "a folder in peft's format"
            raise LitPeftError(f"{given}={value!r} needs {which}, and {folder} is another one: leave it out.")
    if "peft_type" in config:
        peft.read(model, folder, config, key_mapping, low_cpu_mem_usage)
    elif own.KEY in config:
        own.read(model, folder, config)
    elif "config" in config:
        adapterhub.read(model, folder, config, with_head)
    else:
        raise LitPeftError(
            f"{folder}/adapter_config.json has neither 'peft_type' (peft) nor 'config' (AdapterHub), so its format is "
            "not known: give a folder that one of these libraries saved."
        )
    if not autocast_adapter_dtype:
        use_base_dtype(attachment_of(model))
    return model


def save_adapter(
    model: nn.Module, folder: str | Path, format: Literal["peft", "adapterhub"] | None = None, name: str = "default"
) -> Path:
    """Save everything that was trained in a folder that `load_adapter`, and the library of the format, can load.

    The folder appears complete or not at all: it is written under a temporary name, synced to disk, and renamed.

    Args:
        model: a model with a method attached.
        folder: where to write. It must be empty, or not exist yet.
        format: `peft` or `adapterhub`. When None, peft's format if it supports what is attached, else AdapterHub's with
            the settings that AdapterHub does not know added, else a format of our own.
        name: the adapter's name in AdapterHub's format.

    Returns:
        The folder.

    Raises:
        LitPeftError: nothing is attached, the format does not support what is attached, a parameter is trained that
            does not belong to the adapter, a weight is NaN or infinite, or the folder is not empty.
    """
    with new_folder(folder) as temporary:
        write_adapter(model, temporary, format, name)
    return Path(folder)


def write_adapter(
    model: nn.Module, folder: Path, format: Literal["peft", "adapterhub"] | None = None, name: str = "default"
) -> None:
    """Write the files of `save_adapter` into an existing folder, one after the other.

    Args and errors are those of `save_adapter`.
    """
    attachment = attachment_of(model)
    chosen: str | None = format
    if format not in (None, "peft", "adapterhub"):
        raise LitPeftError(f"format={format!r} is not known: use 'peft' or 'adapterhub'.")
    if not attachment.adapted:
        raise LitPeftError(
            f"{attachment.settings.method!r} has no adapter to save because it trains the model itself: save the model "
            "with model.save_pretrained(folder)."
        )
    if isinstance(attachment, Together):
        names = list(attachment.members)
        raise LitPeftError(
            f"A folder holds one adapter, and several adapters are active, {names}: save each one in a block `with "
            f"lit_peft.use_adapter(model, {names[0]!r}):`, or make one of them with lit_peft.combine_adapters."
        )
    _check_trained_parameters(attachment)
    _check_finite(attachment)
    if format is None and not adapterhub.supports(attachment):
        chosen = "peft" if peft.holds(attachment) else "lit_peft"
    if chosen == "peft":
        peft.write(model, folder)
    elif chosen == "lit_peft":
        own.write(model, folder)
    else:
        adapterhub.write(model, folder, name, extended=format is None)
    base = base_record.base_record(model)
    below = stacked_on(model)
    write_extra(folder, {base_record.KEY: base, **({BELOW: list(below)} if below else {})})
    if attachment.tokenizer is not None:
        attachment.tokenizer.save_pretrained(folder)
    write_card(model, folder, str(base["name"]))


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` when the block ends, or deleted if the block fails.

    Raises:
        LitPeftError: `folder` exists and is not an empty folder, or cannot be written.
    """
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LitPeftError(f"{folder} exists and is not an empty folder: give a new one.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as temporary:
            yield temporary
    except (OSError, SafetensorError) as problem:
        name = getattr(problem, "filename", None)
        if isinstance(name, str) and not Path(name).absolute().is_relative_to(folder.absolute().parent):
            raise  # a file that the block reads
        # safetensors has an error of its own for a full disk.
        error = problem if isinstance(problem, OSError) else OSError(first_line(problem))
        raise LitPeftError(write_failure("The folder", folder, error)) from problem


def _check_trained_parameters(attachment: Attachment) -> None:
    """Check that every parameter that requires gradients belongs to the adapter, and so will be saved.

    Raises:
        LitPeftError: names the first one that does not.
    """
    saved = {id(parameter) for parameter in attachment.saved.values()}
    for module in attachment.adapted.values():
        saved.update(id(p) for name, p in module.named_parameters() if not name.startswith("base_layer."))
    for name, parameter in attachment.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in saved:
            raise LitPeftError(
                f"{name} requires gradients, but it does not belong to the adapter and would not be saved: name it in "
                "modules_to_save when you attach the method, or call requires_grad_(False) on it before you save."
            )


def _check_finite(attachment: Attachment) -> None:
    """Check that no trained weight is NaN or infinite: no library would load it, and nobody could use it.

    Raises:
        LitPeftError: names the first ones that are.
    """
    found = non_finite_names((name, p) for name, p in attachment.model.named_parameters() if p.requires_grad)
    if found:
        raise LitPeftError(
            f"The adapter cannot be saved because it has NaN or infinite weights ({', '.join(found[:3])}): save it "
            "from an earlier checkpoint, and train with a lower learning_rate."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder, "adapter_config.json")
    if config is None:
        raise LitPeftError(f"{folder} has no adapter_config.json: give the folder of an adapter.")
    return config
