"""`lit-peft info`: shows the contents of an adapter's folder or a checkpoint, without loading a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_peft.commands.options import Options
from lit_peft.util.errors import LitPeftError, printable
from lit_peft.util.type_checks import brief

# Files of strangers may have any number of settings and tensors, and names of any length.
_MOST_LINES, _MOST_LETTERS = 200, 200


def run(arguments: list[str]) -> None:
    """Print method, base, settings and a table of the tensors.

    Raises:
        LitPeftError: the path is neither an adapter's folder nor a checkpoint.
    """
    parser = Options("lit-peft info", description="Show what is in an adapter's folder or a checkpoint.")
    parser.add_argument("path", help="the folder, or a .ckpt file")
    options = parser.parse_args(arguments)
    path = Path(options.path)
    if path.is_file():
        from lit_peft.commands.export import load_checkpoint

        checkpoint = load_checkpoint(path)
        settings = checkpoint["hyper_parameters"]
        facts = {"checkpoint": path, "base": settings.get("base", ""), "step": checkpoint.get("global_step", "")}
        tensors, files = checkpoint["state_dict"], [path]
    else:
        from lit_peft.formats.files import read_extra
        from lit_peft.formats.untrusted import read_json, read_tensors

        config = read_json(path, "adapter_config.json")
        if config is None:
            raise LitPeftError(f"{path} is neither an adapter's folder nor a checkpoint.")
        tensors = (
            read_tensors(path, "adapter_model.safetensors", "adapter_model.bin")
            or read_tensors(path, "adapter.safetensors", "pytorch_adapter.bin")
            or {}
        )
        inner = config.get("config")
        settings = dict(inner) if isinstance(inner, dict) else dict(config)
        extra = read_extra(path)
        record = extra.get("base")
        base = record if isinstance(record, dict) else {}
        method = config.get("peft_type") or settings.get("architecture") or "bottleneck"
        name = base.get("name") or config.get("base_model_name_or_path") or config.get("model_name") or "not recorded"
        facts = {"adapter": path, "format": "peft" if "peft_type" in config else "adapterhub"}
        facts.update(method=str(method).lower(), base=name, revision=base.get("revision"))
        facts["stacked on"] = extra.get("stacked_on")
        files = [file for file in path.iterdir() if file.is_file()]
    total = sum(tensor.numel() for tensor in tensors.values())
    facts.update(parameters=f"{total:,}", size=f"{sum(file.stat().st_size for file in files) / 2**20:.2f} MB")
    shown = {key: value for key, value in {**facts, **settings}.items() if value not in (None, "", [], {}, False)}
    for key, value in list(shown.items())[:_MOST_LINES]:
        text = str(value)[:300] if isinstance(value, (str, Path)) else brief(value, 300)
        print(f"{printable(str(key)[:_MOST_LETTERS]) + ':':<22}{printable(text)}")
    if len(shown) > _MOST_LINES:
        print(f"… {len(shown) - _MOST_LINES:,} more settings")
    print(_table(tensors))


def _table(tensors: Mapping[str, Any]) -> str:
    """Format the tensors as a table, with `*` in place of the layer number."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, tensor in tensors.items():
        short = name if len(name) <= _MOST_LETTERS else f"{name[:_MOST_LETTERS]}…"
        pattern = re.sub(r"\.\d+\.", ".*.", printable(short))
        key = (pattern, brief(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(tensor.numel())
    rows = [(*key, str(len(sizes)), f"{sum(sizes):,}") for key, sizes in list(groups.items())[:_MOST_LINES]]
    rows.insert(0, ("tensor", "shape", "dtype", "count", "parameters"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    more = [f"… {len(groups) - _MOST_LINES:,} more tensors"] if len(groups) > _MOST_LINES else []
    return "\n" + "\n".join([*lines, *more])
