"""The short model card beside an adapter."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from lit_peft.methods.attachment import attachment_of, trainable_parameters


def write_card(model: nn.Module, folder: Path, base: str) -> None:
    """Write `README.md`, with the front matter that the hub reads: base, method, settings, sizes, how to load it."""
    attachment = attachment_of(model)
    settings: Any = attachment.settings
    # The hub takes only its own ids for a base model.
    is_id = base.count("/") <= 1 and not Path(base).exists() and not base.startswith((".", "/", "~", "pkg:"))
    lines = ["---", *([f"base_model: {base}"] if is_id else []), "library_name: peft", "tags:"]
    lines += ["- lit-peft", f"- {settings.method.replace('_', '-')}", "---", "", f"# {settings.method} adapter", ""]
    lines += [f"Trained on `{base}` with `{type(settings).__name__}`:", "", "| setting | value |", "|---|---|"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None and value != {} and value != ():
            lines.append(f"| {field.name} | {str(value)[:200].replace('|', chr(92) + '|')} |")
    lines += ["", f"{trainable_parameters(model):,} trained parameters in this folder.", "", "```python"]
    lines += ["import lit_peft", "", "model = lit_peft.load_adapter(model, FOLDER).eval()", "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
