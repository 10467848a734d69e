"""The model card that is saved with an adapter."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from lit_peft.formats.base_record import base_name_or_path
from lit_peft.methods.adapters import active_adapter
from lit_peft.methods.attachment import attachment_of, trainable_parameters
from lit_peft.methods.stack import names_of


def write_card(model: nn.Module, folder: Path, base: str) -> None:
    """Write `README.md`: the metadata that the Hugging Face Hub reads, the settings, and how to load the adapter.

    Args:
        model: a model with a method attached.
        folder: an existing folder.
        base: the name or path of the base model.
    """
    settings: Any = attachment_of(model).settings
    # The hub rejects a base model that is not a repository id. A model that was not loaded is named by its class.
    is_local = Path(base).exists() or base.startswith((".", "/", "~", "pkg:"))
    is_hub_id = bool(base_name_or_path(model)) and base.count("/") <= 1 and not is_local
    lines = ["---", *([f"base_model: {base}"] if is_hub_id else []), "library_name: peft", "tags:"]
    lines += ["- lit-peft", f"- {settings.method.replace('_', '-')}", "---", "", f"# {settings.method} adapter", ""]
    lines += [f"Trained on `{base}` with `{type(settings).__name__}`:", "", "| setting | value |", "|---|---|"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None and value != {} and value != ():
            lines.append(f"| {field.name} | {str(value)[:200].replace('|', chr(92) + '|')} |")
    started_from = attachment_of(model).started_from
    lines += ["", f"Training started from the adapter `{started_from}`."] if started_from else []
    below = stacked_on(model)
    if below:
        lines += ["", f"Trained stacked on {', '.join(f'`{name}`' for name in below)}: load these adapters first, then"]
        lines += ["this one with a name, and call `lit_peft.set_adapter` with a `lit_peft.Stack` of all names."]
    lines += ["", f"{trainable_parameters(model):,} trained parameters in this folder.", "", "```python"]
    lines += ["import lit_peft", "", "model = lit_peft.load_adapter(model, FOLDER).eval()", "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def stacked_on(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that a model's active one is stacked on."""
    return names_of(active_adapter(model))[:-1] if attachment_of(model).below else ()
