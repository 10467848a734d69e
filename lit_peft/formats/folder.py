"""`load_adapter` and `save_adapter`: which format a folder has, and writing a folder whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lit_peft.formats import adapterhub, base_record, own, peft
from lit_peft.formats.card import write_card
from lit_peft.formats.files import write_extra
from lit_peft.formats.untrusted import read_json
from lit_peft.methods.adapters import new_adapter
from lit_peft.methods.attachment import Model, attachment_of
from lit_peft.util.disk import whole_folder
from lit_peft.util.errors import LitPeftError


def load_adapter(model: Model, folder: str | Path, check_base: bool = True, name: str | None = None) -> Model:
    """Read an adapter's folder and attach it to a bare model, ready for `model.eval()`.

    Args:
        model: the base model, as transformers loaded it.
        folder: the adapter's folder, in peft's format or AdapterHub's.
        name: load it beside the adapters that are there, under this name, as the active one.
        check_base: refuse a model that is not the base the adapter was trained on, where the folder says which.

    Returns:
        The same model, the adapter attached.

    Raises:
        LitPeftError: the model is another base, a file is missing, the method or a setting is not one that can be
            read, or the tensors do not fit the model. The model is as it was.
    """
    folder = Path(folder)
    if name is not None:
        with new_adapter(model, name):
            return load_adapter(model, folder, check_base)
    config = _read_config(folder)
    if check_base:
        base_record.check_base(model, folder)
    if "peft_type" in config:
        return peft.read(model, folder, config)
    if own.KEY in config:
        return own.read(model, folder, config)
    if "config" in config:
        return adapterhub.read(model, folder, config)
    raise LitPeftError(
        f"{folder}/adapter_config.json has neither 'peft_type' (peft) nor 'config' (AdapterHub), so its format is not "
        "known: give a folder that one of them saved."
    )


def save_adapter(
    model: nn.Module, folder: str | Path, format: Literal["peft", "adapterhub"] | None = None, name: str = "default"
) -> Path:
    """Write what is attached as a folder that `load_adapter`, and the format's own library, load.

    The folder appears whole or not at all: it is written beside its place, synced, and renamed.

    Args:
        model: a model with a method attached.
        folder: where to write; it must not exist yet, or be empty.
        format: `peft` or `adapterhub`; when None, the library's that has the method, else a format of our own.
        name: the adapter's name in AdapterHub's format.

    Returns:
        The folder.

    Raises:
        LitPeftError: nothing is attached, the format cannot hold it, or the folder holds files already.
    """
    with new_folder(folder) as temporary:
        write_adapter(model, temporary, format, name)
    return Path(folder)


def write_adapter(
    model: nn.Module, folder: Path, format: Literal["peft", "adapterhub"] | None = None, name: str = "default"
) -> None:
    """Write the files of `save_adapter` into a folder that exists; a reader may see it half written. Raises as it."""
    attachment = attachment_of(model)
    chosen: str | None = format
    if format not in (None, "peft", "adapterhub"):
        raise LitPeftError(f"format={format!r} is not known: use 'peft' or 'adapterhub'.")
    if not attachment.adapted:
        raise LitPeftError(
            f"{attachment.settings.method!r} has no adapter to write, but trains the model itself: save that, "
            "model.save_pretrained(folder)."
        )
    if format is None and not adapterhub.holds(attachment):
        chosen = "peft" if peft.holds(attachment) else "lit_peft"
    if chosen == "peft":
        peft.write(model, folder)
    elif chosen == "lit_peft":
        own.write(model, folder)
    else:
        adapterhub.write(model, folder, name, own=format is None)
    base = base_record.base_record(model)
    write_extra(folder, {base_record.KEY: base})
    write_card(model, folder, str(base["name"]))


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, and is gone if the block fails.

    Raises:
        LitPeftError: `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LitPeftError(f"{folder} exists and is not an empty folder: give a new one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as temporary:
        yield temporary


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder, "adapter_config.json")
    if config is None:
        raise LitPeftError(f"{folder} has no adapter_config.json: give the folder of an adapter.")
    return config
