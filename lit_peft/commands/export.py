"""`lit-peft export`: writes an adapter's folder from a training checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_peft.commands.options import Options
from lit_peft.methods.registry import METHODS
from lit_peft.util.errors import LitPeftError, closest, first_line


def run(arguments: list[str]) -> None:
    """Rebuild the module of a `.ckpt` file and save its adapter.

    Raises:
        LitPeftError: the input is wrong.
    """
    parser = Options("lit-peft export", description="Write an adapter's folder from a training checkpoint.")
    parser.add_argument("--ckpt_path", required=True, help="the checkpoint of a lit-peft run")
    parser.add_argument("--output", required=True, help="the new folder")
    parser.add_argument(
        "--format", choices=["peft", "adapterhub"], default=None, help="the usual one of the method when unset"
    )
    parser.add_argument("--method", default=None, help="LoRA, ...; from the run's config.yaml when unset")
    parser.add_argument("--base", default=None, help="the base, if it has moved since training")
    parser.add_argument("--trust_remote_code", action="store_true", help="execute code of a hub base")
    options = parser.parse_args(arguments)

    import lit_peft.modules
    from lit_peft.formats.folder import save_adapter

    checkpoint = load_checkpoint(Path(options.ckpt_path))
    method = options.method or _method(Path(options.ckpt_path))
    if method not in METHODS:
        raise LitPeftError(f"--method {method} is unknown: the closest are {closest(method, METHODS)}.")
    settings: dict[str, Any] = {**checkpoint["hyper_parameters"], **({"base": options.base} if options.base else {})}
    # The caller decides this, not the author of the checkpoint.
    settings["trust_remote_code"] = options.trust_remote_code
    module: Any = getattr(lit_peft.modules, method)(**settings)
    module.load_state_dict(checkpoint["state_dict"])
    print(f"exported: {save_adapter(module.model, options.output, options.format)}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint of plain data and tensors. No code in it is executed.

    Raises:
        LitPeftError: the file is missing, or is not such a checkpoint.
    """
    import torch

    if not path.is_file():
        raise LitPeftError(f"{path} is not a file: give the .ckpt of a lit-peft run.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # pickle.UnpicklingError, RuntimeError, EOFError, ...
        raise LitPeftError(f"{path} cannot be read safely as a checkpoint ({first_line(problem)}).") from None
    for part in ("state_dict", "hyper_parameters"):
        values = checkpoint.get(part) if isinstance(checkpoint, dict) else None
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise LitPeftError(f"{path} is not a checkpoint of a lit-peft run: it has no named settings and tensors.")
    if not all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values()):
        raise LitPeftError(
            f"{path} is not a checkpoint of a lit-peft run: its state_dict has values that are not tensors."
        )
    return checkpoint


def _method(path: Path) -> str:
    import yaml

    for folder in path.resolve().parents[:2]:
        file = folder / "config.yaml"
        if file.is_file():
            config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            return str((config.get("model") or {}).get("class_path", "")).rpartition(".")[2]
    raise LitPeftError(f"There is no config.yaml next to {path}: name the method with --method, e.g. LoRA.")
