"""What a checkpoint says of its run, and what a run that goes on from it must have in common with it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_peft.data.record import data_differences, data_record
from lit_peft.formats.base_record import base_record, same_base
from lit_peft.methods.attachment import attachment_or_none
from lit_peft.training.lightning_internals import datamodule_of, trainer_of
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

RECORD = "run"
# Settings whose new value simply holds from now on: they change speed, memory or what is printed.
_FREE = {
    *("dtype", "adapter_dtype", "attn_implementation", "gradient_checkpointing", "supervised_loss"),
    *("trust_remote_code", "generation", "compile"),
}
# Settings without effect once training is over.
_TRAINING_ONLY = {
    *("learning_rate", "optimizer", "optimizer_args", "weight_decay", "lr_scheduler", "lr_scheduler_kwargs"),
    *("warmup_steps", "neftune_noise_alpha", "adapter", "lora_dropout", "dropout", "encoder_dropout"),
    *("loraplus_lr_ratio", "init_weights", "init_std", "prompt_tuning_init", "prompt_tuning_init_text"),
    *("prompt_tuning_init_labels", "tokenizer_name_or_path"),
}
# Compared in other ways: the labels may come from the data, and the base and the adapters below may have moved.
_COMPARED_APART = {"base", "labels", "num_labels", "stack"}


def run_record(module: Any) -> dict[str, Any]:
    """Return the settings that a module was given, its labels and its data, as plain data for a checkpoint."""
    return {
        "settings": _given_settings(module),
        "labels": _labels(module),
        "data": data_record(datamodule_of(module)),
        "steps": _total_steps(module),
        "base": {} if attachment_or_none(module.model) is None else base_record(module.model),
    }


def _total_steps(module: Any) -> int | None:
    """Return how many optimizer steps the run has; None if that is unknown."""
    trainer: Any = trainer_of(module)
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # gradients are accumulated over a changing number of batches
        return None
    return int(steps) if math.isfinite(steps) else None


def say_new_length(module: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say that the schedule of the learning rate now ends at another step than that of the resumed run."""
    one, other = before.get("steps"), now.get("steps")
    if one is not None and one != other and not module.hparams.lr_scheduler.startswith("constant"):
        length = "an unknown number of steps" if other is None else f"{other:,} steps"
        say(
            f"the run had {one:,} steps and has {length} now, so from here on the learning rate is that of a schedule "
            "of the new length"
        )


def check_checkpoint(module: Any, data: Any, checkpoint: Mapping[str, Any], path: Any, stage: str) -> list[str]:
    """Check that a module and its data are those of the run that wrote a checkpoint.

    Settings that do not change what is trained may differ. A checkpoint of an earlier version says nothing of its data,
    so that only the settings are compared.

    Args:
        module: the module, with its labels.
        data: its data module, after `setup`; None if there is none.
        checkpoint: the content of the checkpoint.
        path: where it was read from, for the message.
        stage: `fit`, or another stage, in which neither the training data nor the settings of training matter.

    Returns:
        A line for each setting that differs and may.

    Raises:
        LitPeftError: the data, the labels or a setting differs, and training would mix the two, or evaluation would
            compute something that was never trained.
    """
    record = checkpoint.get(RECORD) or {}
    before = record.get("settings") or dict(checkpoint.get("hyper_parameters") or {})
    labels = record.get("labels") or before.get("labels")
    differences = _label_differences(labels, _labels(module))
    free, bound = _setting_differences(before, _given_settings(module), stage)
    if stage == "fit":
        seed, given = checkpoint.get("run_seed"), os.environ.get("PL_GLOBAL_SEED")
        if seed is not None and given is not None and int(given) != seed:
            bound.append(f"seed_everything was {seed} and is {given} now")
        differences = [*data_differences(record.get("data") or {}, data_record(data)), *differences]
        if differences:
            raise LitPeftError(
                f"{path} was trained on other data: {'; '.join(differences)}. Give the data of that run to "
                f"continue it. {_new_run(path)}"
            )
    elif differences:
        raise LitPeftError(
            f"{path} was trained with other labels: {differences[0]}. Give data with the labels of that run, in the "
            "same order, or name them with data.labels."
        )
    if bound:
        rest = f" {_new_run(path)}" if stage == "fit" else ""
        raise LitPeftError(f"{path} was trained with other settings: {'; '.join(bound)}. Give the old values.{rest}")
    return free if stage == "fit" else []


def check_checkpoint_file(module: Any, data: Any, path: Any, stage: str) -> None:
    """Do the same before a Trainer writes anything; a checkpoint that is a folder is checked when it is loaded.

    Args:
        module: the module, with its labels; it has not been given to a Trainer.
        data: its data module, after `setup`; None if there is none.
        path: the checkpoint; None or a word such as `last` if there is none.
        stage: as for `check_checkpoint`.

    Raises:
        LitPeftError: as `check_checkpoint`.
    """
    if path is None or not Path(str(path)).is_file():
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # Lightning reports what is wrong with the file when it loads it
        return
    if isinstance(checkpoint, dict):
        check_checkpoint(module, data, checkpoint, path, stage)


def check_same_base(module: Any, checkpoint: Mapping[str, Any], path: Any) -> None:
    """Check that a module's model is the base that a checkpoint was trained on, if it has another name.

    Raises:
        LitPeftError: the weights of the base differ from the recorded ones.
    """
    record = checkpoint.get(RECORD) or {}
    before, now = (record.get("settings") or {}).get("base"), module.hparams.base
    if before is None or before == now or os.path.realpath(before) == os.path.realpath(now):
        return
    if not same_base(record.get("base") or {}, base_record(module.model)):
        raise LitPeftError(
            f"{path} was trained on base={before!r}, and base={now!r} has other weights: give the base of that run."
        )
    say(f"model.base was {before} and is {now} now, which has the same weights")


@rank_zero_only
def say(line: str, subject: str = "resumed:") -> None:
    """Print a line of the banner: what differs from the run that is resumed, or what concerns another subject."""
    print(f"{subject:<11}{line}", flush=True)


def _new_run(path: Any) -> str:
    return (
        "To train its weights further in another way, start a new run from them: `lit-peft export --ckpt_path "
        f"{path} --output FOLDER`, then `--model.adapter FOLDER`."
    )


def _given_settings(module: Any) -> dict[str, Any]:
    """Return the settings as they were given, as plain data; the learning rate is that of the method if unset.

    The settings of the task include those that it took from the data, without those that change no weight and no loss.
    """
    settings = {name: _plain(value) for name, value in dict(module.hparams_initial).items()}
    if "task_args" in settings:
        found = _plain(module.hparams.task_args)
        settings["task_args"] = {name: found[name] for name in found if name not in module.task.free_settings}
    if "learning_rate" in settings:
        settings["learning_rate"] = float(settings["learning_rate"] or module.settings.learning_rate)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _labels(module: Any) -> list[str] | None:
    labels = module.hparams.get("labels")
    return None if labels is None else [str(label) for label in labels]


def _label_differences(before: Any, now: Any) -> list[str]:
    if before is None or now is None or list(map(str, before)) == now:
        return []
    return [f"the labels were {brief(list(map(str, before)))} and are {brief(now)} now"]


def _setting_differences(before: Mapping[str, Any], now: Mapping[str, Any], stage: str) -> tuple[list[str], list[str]]:
    """Return the settings that may differ and do, and those that may not and do, each as a phrase."""
    free: list[str] = []
    bound: list[str] = []
    for name in before.keys() & now.keys() - _COMPARED_APART:
        one, other = _plain(before[name]), now[name]
        if one == other or (stage != "fit" and name in _TRAINING_ONLY):
            continue
        if name == "learning_rate" and one is None:  # an earlier version recorded that it was not set
            continue
        phrase = f"model.{name} was {brief(one)} and is {brief(other)} now"
        (free if name in _FREE else bound).append(phrase)
    return sorted(free), sorted(bound)
