"""Options that several commands share, and loading the base that they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_peft.models.audio_features import AUDIO
from lit_peft.util.errors import LitPeftError, closest


class Options(argparse.ArgumentParser):
    """An argument parser that reports errors as `LitPeftError`."""

    def error(self, message: str) -> NoReturn:
        raise LitPeftError(f"{message}: see `{self.prog} --help`.")

    def takes_base(self) -> None:
        """Add the options for loading a base model."""
        self.add_argument("--base", required=True, help="hub id, model folder, .gguf file or pkg:DISTRIBUTION")
        self.add_argument("--revision", help="branch, tag or commit of a hub model")
        self.add_argument(
            "--task", default=None, help="task of the model; the architecture in the base's config when unset"
        )
        self.add_argument("--num_labels", type=int, default=None, help="number of labels, for classification")
        self.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto for the stored type")
        self.add_argument("--quantization", default=None, help="int8, int4, nf4, ...: as in training")
        self.add_argument("--force", action="store_true", help="use the adapter on a base that it was not trained on")


def base_options(base: str, **given: Any) -> argparse.Namespace:
    """Return the options that `load_base_from_options` reads, with defaults for those that are not given.

    Raises:
        LitPeftError: an option does not exist.
    """
    parser = Options()
    parser.takes_base()
    known = vars(parser.parse_args([f"--base={base}"]))
    for name in given:
        if name not in known:
            raise LitPeftError(f"{name!r} is not an option for a base: the closest are {closest(name, known)}.")
    return argparse.Namespace(**{**known, **given})


def adapter_folders(given: Sequence[str]) -> dict[str, str]:
    """Return the folders of `--adapter [NAME=]FOLDER` by name; without NAME, they are adapter0, adapter1, ...

    Raises:
        LitPeftError: a name is given twice, or a folder has no adapter.
    """
    from lit_peft.formats.untrusted import read_json

    found: dict[str, str] = {}
    for number, text in enumerate(given):
        name, _, folder = text.rpartition("=")
        name = name or f"adapter{number}"
        if name in found:
            raise LitPeftError(f"--adapter {text}: the name {name!r} is given twice.")
        if read_json(Path(folder), "adapter_config.json") is None:
            raise LitPeftError(f"--adapter {text}: {folder} has no adapter_config.json: give the folder of an adapter.")
        found[name] = folder
    return found


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Check that each of these options is unset or at least 1.

    Raises:
        LitPeftError: one is not.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise LitPeftError(f"--{name} {value} must be an integer of at least 1.")


def check_generates(model: Any) -> None:
    """Check that a model can generate text.

    Raises:
        LitPeftError: it cannot.
    """
    # Models without a language modeling head have no `can_generate`, or it returns False.
    if not getattr(model, "can_generate", lambda: False)():
        raise LitPeftError(
            f"--base {model._lit_peft_base!r} is a {type(model).__name__}, which cannot generate text: give a causal "
            "or an encoder-decoder model, or the --task to load it for."
        )
    if getattr(model, "main_input_name", "input_ids") in AUDIO:
        raise LitPeftError(
            f"--base {model._lit_peft_base!r} is a {type(model).__name__}, which takes audio, not a prompt: transcribe "
            "recordings with `lit-peft predict`."
        )


def load_base_from_options(options: argparse.Namespace) -> Any:
    """Load the base model that the options name.

    Raises:
        LitPeftError: it cannot be loaded, or an option has an invalid value.
    """
    import torch
    import transformers

    from lit_peft.models.loading import BaseSettings, load_base, load_config
    from lit_peft.models.quantization import check_quantization
    from lit_peft.tasks import find_task

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LitPeftError(f"--dtype {options.dtype} is not known: use float32, bfloat16, float16 or auto.")
    check_counts(options, "num_labels")
    check_quantization(options.quantization)
    task = None if options.task is None else find_task(options.task)
    settings = BaseSettings(options.base, options.revision, quantization=options.quantization)
    config = load_config(settings, None, options.num_labels, needs_padding=task is not None and task.new_head)
    if task is None:
        name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
        model_class = getattr(transformers, name, transformers.AutoModelForCausalLM)
    else:
        model_class = task.model_class(config)
    return load_base(settings, config, model_class, dtype, () if task is None else task.heads)[0]
