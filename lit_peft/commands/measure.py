"""One run of `lit-peft compare`: it is trained and measured in its own process."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_peft.commands.plan import Cell
from lit_peft.data.record import data_record
from lit_peft.util.errors import LitPeftError, closest, first_line
from lit_peft.util.memory import peak_memory, process_memory

# To turn a budget of seconds into one of steps: as many steps to warm up, then as many that are timed.
_TIMED_STEPS = 8
_QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def make_data(base: str, model: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Build the data module of a comparison.

    Args:
        base: the base model, whose tokenizer the data uses.
        model: settings of the LightningModule, of which `revision` applies to the tokenizer, too.
        settings: `class_path` and `init_args`.

    Raises:
        LitPeftError: the class is unknown, or does not accept the arguments.
    """
    import lit_peft.data

    name, init = settings["class_path"], {"base": base, **settings.get("init_args", {})}
    if init["base"] == base and "tokenizer" not in init:
        init.setdefault("revision", model.get("revision"))
    names = [known for known in lit_peft.data.__all__ if known != "LitDataModule"]
    if name not in names:
        raise LitPeftError(f"data.class_path={name!r} is unknown: the closest are {closest(name, names)}.")
    try:
        return getattr(lit_peft.data, name)(**init)
    except TypeError as problem:
        raise LitPeftError(f"data.init_args do not fit {name}: {first_line(problem)}") from problem


def hash_of_data(data: Any) -> str:
    """Return a hash of the examples of all splits of a comparison's data module, after `setup("fit")`."""
    if "test" in data.rows:
        data.setup("test")
    record = data_record(data, ("train", "validation", "test"))
    facts = {split: known["hash"] for split, known in record["splits"].items()}
    facts["labels"] = getattr(data, "label_names", None)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def make_module(cell: Cell) -> Any:
    """Build the LightningModule of a run; its base is not loaded yet."""
    import lit_peft

    cls = getattr(lit_peft, cell.method)
    return cls(base=cell.base, task=cell.task, learning_rate=cell.learning_rate, **cell.model)


def measure_in_process(cell: Cell, device: int | None = None) -> dict[str, Any]:
    """Call `measure` in a new process, so that the peak memory is that of the run alone.

    Returns:
        What `measure` returns; `error` alone if the run failed.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        # The server imports the heavy packages once, and the process of each run is forked from it.
        context.set_forkserver_preload(["lit_peft.commands.preload"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(cell, send, device), daemon=True)
    process.start()
    send.close()
    try:
        result: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        return {
            "error": f"the process ended with status {process.exitcode} (-9: killed, probably because memory ran out)"
        }
    except KeyboardInterrupt:
        process.terminate()
        raise
    process.join()
    return result


def _measure_and_send(cell: Cell, send: Any, device: int | None) -> None:
    try:
        result = measure(cell, device)
    except Exception as problem:
        result = {"error": f"{type(problem).__name__}: {first_line(problem)}"}
    send.send(result)
    send.close()


def measure(cell: Cell, device: int | None = None) -> dict[str, Any]:
    """Train the model of a run and measure it.

    Args:
        cell: what to train.
        device: index of the GPU to use if the Trainer uses GPUs; any GPU when None.

    Returns:
        `metric` and `mode`; `validation` and `test` (None without test rows), the metric after the last step; `rows`,
        the number of evaluated rows; `trainable` and `total`, numbers of parameters; `steps`; `adapter_bytes`;
        `peak_memory_bytes`, of the tensors on a GPU, else of the process beyond libraries and data; `seconds_per_step`,
        the median; `curve`: step, seconds of training so far and validation metric of each validation.
    """
    import logging
    import warnings

    import torch
    from lightning.pytorch import Trainer, seed_everything

    from lit_peft.commands.recorder import Recorder
    from lit_peft.methods.attachment import trainable_parameters
    from lit_peft.util.quiet import quiet_libraries

    quiet_libraries()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    seed_everything(cell.seed, verbose=False)
    data = make_data(cell.base, cell.model, cell.data)
    data.setup("fit")
    has_test = "test" in data.rows
    if has_test:
        data.setup("test")
    if cell.data_hash and hash_of_data(data) != cell.data_hash:
        raise LitPeftError(
            "The data has changed since the comparison began: start it again to compare on the new data."
        )
    # The rows have been drawn, the same for all runs; from here on the seed determines the order of training.
    data.seed += cell.seed
    module = make_module(cell)
    module.take_labels(data)
    gc.collect()
    before = process_memory("VmRSS") or peak_memory() or 0
    recorder = Recorder(module.task.monitor[0])
    steps = cell.steps if cell.seconds is None else steps_in_budget(cell, device)
    settings: dict[str, Any] = {
        **_QUIET,
        "num_sanity_val_steps": 0,
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": -(-steps // cell.evaluations) * cell.accumulated_batches,
        "check_val_every_n_epoch": None,
    }
    trainer = Trainer(**{**settings, **_device_arguments(cell, device)}, callbacks=[recorder])
    trainer.fit(module, datamodule=data)
    if not recorder.curve or recorder.curve[-1][0] < steps:
        trainer.validate(module, datamodule=data, verbose=False)
    cuda = trainer.strategy.root_device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else max(0, (peak_memory() or 0) - before)
    test = None
    name = module.task.monitor[0].removeprefix("val_")
    if has_test:
        test = float(trainer.test(module, datamodule=data, verbose=False)[0][f"test_{name}"])
    return {
        "metric": name,
        "mode": module.task.monitor[1],
        "validation": recorder.curve[-1][2],
        "test": test,
        "steps": steps,
        "rows": len(data.rows["test" if has_test else "validation"]),
        "trainable": trainable_parameters(module.model),
        "total": sum(parameter.numel() for parameter in module.model.parameters()),
        "adapter_bytes": _adapter_bytes(module),
        "peak_memory_bytes": peak,
        "seconds_per_step": recorder.seconds_per_step * cell.accumulated_batches,
        "curve": recorder.curve,
        "device": str(trainer.strategy.root_device),
    }


def _device_arguments(cell: Cell, device: int | None) -> dict[str, Any]:
    """The Trainer's arguments for one device: the GPU with this index, or any device when None."""
    import torch

    gpu = device is not None and torch.cuda.is_available() and cell.trainer.get("accelerator") != "cpu"
    return {"devices": [device] if gpu else 1, **cell.trainer}


def steps_in_budget(cell: Cell, device: int | None) -> int:
    """Return how many optimizer steps fit in the seconds of a run, from the median time of a few."""
    from lightning.pytorch import Trainer, seed_everything

    from lit_peft.commands.recorder import Recorder

    seed_everything(cell.seed, verbose=False)
    data = make_data(cell.base, cell.model, cell.data)
    data.setup("fit")
    module = make_module(cell)
    module.take_labels(data)
    recorder = Recorder(module.task.monitor[0], skip=_TIMED_STEPS)
    quick = {"max_steps": 2 * _TIMED_STEPS, "max_epochs": -1, "limit_val_batches": 0}
    Trainer(**{**_QUIET, **quick, **_device_arguments(cell, device)}, callbacks=[recorder]).fit(module, datamodule=data)
    return max(1, int((cell.seconds or 0) / (recorder.seconds_per_step * cell.accumulated_batches)))


def _adapter_bytes(module: Any) -> int:
    """The size of the adapter's folder, or that of the trained tensors if no format can hold them."""
    from lit_peft.formats.folder import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        try:
            saved = save_adapter(module.model, Path(folder) / "adapter")
        except LitPeftError:
            return sum(value.numel() * value.element_size() for value in module.state_dict().values())
        return sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
