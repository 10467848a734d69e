"""`lit-peft export`: writes an adapter's folder from a training checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_peft.commands.options import Options
from lit_peft.methods.registry import METHODS
from lit_peft.util.errors import LitPeftError, closest, printable
from lit_peft.util.type_checks import brief

# The settings of a module that a checkpoint may choose, besides those of its method: they name no code to load.
FROM_CHECKPOINT = (
    *("base", "revision", "task", "task_args", "labels", "num_labels", "dtype", "adapter_dtype", "quantization"),
)
# A checkpoint's settings are few; this is more labels than a head has.
MAX_VALUES = 100_000
# How much of a config.yaml is looked at for the method's name, which is at the start.
_CONFIG_BYTES, _CONFIG_DEPTH = 2**17, 20


def run(arguments: list[str]) -> None:
    """Rebuild the module of a `.ckpt` file and save its adapter.

    Raises:
        LitPeftError: the input is wrong.
    """
    parser = Options("lit-peft export", description="Write an adapter's folder from a training checkpoint.")
    parser.add_argument("--ckpt_path", required=True, help="the checkpoint of a lit-peft run")
    parser.add_argument("--output", required=True, help="the new folder")
    parser.add_argument(
        "--format",
        choices=["peft", "adapterhub", "gguf"],
        default=None,
        help="the usual one of the method when unset; gguf: a LoRA for llama.cpp and Ollama",
    )
    parser.add_argument("--method", default=None, help="LoRA, ...; the checkpoint's when unset")
    parser.add_argument("--base", default=None, help="the base, if it has moved since training")
    parser.add_argument("--trust_remote_code", action="store_true", help="execute code of a hub base")
    options = parser.parse_args(arguments)

    import lit_peft.modules
    from lit_peft.formats.folder import new_folder, write_adapter
    from lit_peft.formats.gguf_lora import write_gguf_lora

    path = Path(options.ckpt_path)
    checkpoint = load_checkpoint(path)
    method = options.method or _method(path, checkpoint)
    if method not in METHODS:
        raise LitPeftError(f"--method {method} is unknown: the closest are {closest(method, METHODS)}.")
    kind: Any = getattr(lit_peft.modules, method)
    settings = _safe_settings(kind, checkpoint, path)
    if options.base:
        settings["base"] = options.base
    else:
        print(f"base: {printable(str(settings.get('base')))} (named by the checkpoint; --base names another)")
    with new_folder(options.output) as folder:
        # The caller decides about code, not the author of the checkpoint.
        module = kind(**settings, trust_remote_code=options.trust_remote_code)
        _check_tensors(module, checkpoint["state_dict"], path)
        module.load_state_dict(checkpoint["state_dict"])
        if options.format == "gguf":
            write_gguf_lora(module.model, folder)
        else:
            write_adapter(module.model, folder, options.format)
            _note_stack(checkpoint, folder)
    print(f"exported: {options.output}")


def _note_stack(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write into an exported folder on which adapters its own was stacked."""
    from lit_peft.formats.files import write_extra
    from lit_peft.formats.folder import BELOW

    run = checkpoint.get("run")
    record = run.get("stack") if isinstance(run, dict) else None
    entries = record if isinstance(record, list) else []
    names = [str(entry.get("name"))[:200] for entry in entries[:100] if isinstance(entry, dict)]
    if names:
        write_extra(folder, {BELOW: names})
        print(f"stacked on: {printable(', '.join(names))}, which is not in the folder")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint of plain data and tensors. No code in it is executed.

    Raises:
        LitPeftError: the file is missing, or is not such a checkpoint.
    """
    from lit_peft.formats.untrusted import is_tensors, read_pickle

    if not path.is_file():
        raise LitPeftError(f"{path} is not a file: give the .ckpt of a lit-peft run.")
    try:
        checkpoint = read_pickle(path)
    except ValueError as problem:
        raise LitPeftError(
            f"{path} cannot be read safely as a checkpoint ({problem}): give the .ckpt of a lit-peft run."
        ) from None
    for part in ("state_dict", "hyper_parameters"):
        values = checkpoint.get(part) if isinstance(checkpoint, dict) else None
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise LitPeftError(f"{path} is not a checkpoint of a lit-peft run: it has no named settings and tensors.")
    if not is_tensors(checkpoint["state_dict"]):
        raise LitPeftError(
            f"{path} is not a checkpoint of a lit-peft run: its state_dict has values that are not plain tensors."
        )
    if _count(checkpoint["hyper_parameters"], MAX_VALUES) > MAX_VALUES:
        raise LitPeftError(f"{path} has more than {MAX_VALUES:,} values in its settings, so it is not read.")
    return checkpoint


def _count(value: Any, most: int) -> int:
    """Count the values in nested collections, a part that occurs twice twice, until there are more than `most`."""
    found, left = 0, [value]
    while left and found <= most:
        part = left.pop()
        found += 1
        if isinstance(part, Mapping):
            found += len(part)
            left.extend(list(part.values())[: most + 1])
        elif isinstance(part, (list, tuple, set, frozenset)):
            left.extend(list(part)[: most + 1])
    return found


def _safe_settings(kind: type[Any], checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the checkpoint's settings that may come from a file, and print the names and values of the others.

    Raises:
        LitPeftError: the module has no such setting, or the quantization is of a kind that can load other files.
    """
    from lit_peft.training.module import BaseLM

    given = checkpoint["hyper_parameters"]
    fields = [field.name for field in dataclasses.fields(kind.settings_class)]
    arguments = inspect.signature(BaseLM).parameters
    unknown = next((name for name in given if name not in fields and name not in arguments), None)
    if unknown is not None:
        raise LitPeftError(
            f"{path} has the setting {brief(unknown)}, which {kind.__name__} does not have: the closest are "
            f"{closest(unknown, [*fields, *arguments])}. Give the --method that it was trained with, or update "
            "lit_peft."
        )
    quantization = given.get("quantization")
    if isinstance(quantization, dict) and not (
        quantization.get("quant_method") == "bitsandbytes"
        and all(isinstance(value, (str, bool, int, float)) for value in quantization.values())
    ):
        raise LitPeftError(
            f"{path} has quantization={brief(quantization)}: of a checkpoint only names and bitsandbytes' settings are "
            "taken, because others can load further files. If it is your own, use lit_peft.LoRA.load_from_checkpoint "
            "(or the class it was trained with) and lit_peft.save_adapter."
        )
    taken = {name: value for name, value in given.items() if name in FROM_CHECKPOINT or name in fields}
    left = [
        f"{name}={brief(value)}"
        for name, value in given.items()
        if name not in taken and value and value != arguments[name].default
    ]
    if left:
        print(f"not taken from the checkpoint: {', '.join(left)}")
    return taken


def _check_tensors(module: Any, state: Mapping[str, Any], path: Path) -> None:
    """Compare the shapes that the settings ask for with the stored ones, before memory is allocated.

    Raises:
        LitPeftError: they differ, or a stored weight is not a finite number.
    """
    from lit_peft.formats.untrusted import check_sizes, check_weights
    from lit_peft.training.building import build_empty_model

    check_sizes(state, {"num_labels": module.hparams.num_labels}, str(path))
    labels = module.hparams.labels
    check_sizes(state, {"the number of labels": None if labels is None else len(labels)}, str(path))
    for name, parameter in build_empty_model(module).named_parameters():
        stored = state.get(f"model.{name}")
        if (stored is None and parameter.requires_grad) or (stored is not None and stored.shape != parameter.shape):
            found = "lacks it" if stored is None else f"has shape {brief(tuple(stored.shape))}"
            raise LitPeftError(
                f"{path} does not fit its settings: {name} has shape {tuple(parameter.shape)} in this "
                f"{type(module).__name__}, and the file {found}. Give the base and method that it was trained with."
            )
    for name, tensor in state.items():
        check_weights(name, tensor, path)


def _method(path: Path, checkpoint: Mapping[str, Any]) -> str:
    """Return the name of the method, from the checkpoint or from the `config.yaml` of its run.

    Raises:
        LitPeftError: neither names it.
    """
    from lit_peft.training.checkpoint_class import CLASS_KEY

    name = checkpoint.get(CLASS_KEY)
    if isinstance(name, str) and name.rpartition(".")[2] in METHODS:
        return name.rpartition(".")[2]
    for folder in path.resolve().parents[:2]:
        file = folder / "config.yaml"
        if file.is_file():
            return _class_in_config(file)
    raise LitPeftError(f"There is no config.yaml next to {path}: name the method with --method, e.g. LoRA.")


def _class_in_config(file: Path) -> str:
    """Return the last part of `model.class_path` in a configuration.

    The file is read from its start until the name is found, so that nothing in it is expanded or built.

    Raises:
        LitPeftError: the start of the file is not YAML, or has no such name.
    """
    import yaml

    with file.open("rb") as opened:
        text = opened.read(_CONFIG_BYTES).decode("utf-8", errors="replace")
    path: list[str | None] = []  # the keys around the current place; None in a list
    key: str | None = None  # the key whose value comes next
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            in_mapping = bool(path) and path[-1] is not None
            if isinstance(event, yaml.ScalarEvent):
                if not in_mapping or key is not None:
                    if [*path[1:], key] == ["model", "class_path"]:
                        return str(event.value).rpartition(".")[2]
                    key = None
                else:
                    key = str(event.value)
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                path.append((key or "") if isinstance(event, yaml.MappingStartEvent) else None)
                key = None
                if len(path) > _CONFIG_DEPTH:
                    break
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                path.pop()
            elif isinstance(event, yaml.AliasEvent):
                key = None if not in_mapping or key is not None else ""
    except (yaml.YAMLError, RecursionError):
        raise LitPeftError(f"{file} is not readable YAML: name the method with --method, e.g. LoRA.") from None
    raise LitPeftError(f"{file} does not name a model.class_path: name the method with --method, e.g. LoRA.")
