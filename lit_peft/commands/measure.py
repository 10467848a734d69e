"""One run of `lit-peft compare`: what decides its result, and training and measuring it in a process of its own."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_peft.util.errors import LitPeftError, closest, first_line
from lit_peft.util.memory import peak_memory, process_memory

# Steps by which a budget of seconds is turned into one of steps, after as many that are not counted.
_PROBED = 8
_QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


@dataclass(frozen=True)
class Cell:
    """One run: a method, a learning rate and a seed, with all that decides its result."""

    method: str
    learning_rate: float
    seed: int
    base: str
    task: str
    data: dict[str, Any]
    model: dict[str, Any]
    trainer: dict[str, Any]
    steps: int
    evaluations: int
    seconds: float | None = None

    @property
    def accumulated(self) -> int:
        """The batches of an optimizer step."""
        return int(self.trainer.get("accumulate_grad_batches", 1))

    @property
    def key(self) -> str:
        """A name that is the same for the same run, and for no other."""
        decides = {name: value for name, value in asdict(self).items() if value is not None}
        if self.seconds is not None:
            del decides["steps"]
        text = json.dumps(decides, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_data(base: str, model: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """The data module of a comparison's `data`, for a base and its module's further settings.

    Raises:
        LitPeftError: it is not known, or does not take the arguments.
    """
    import lit_peft.data

    name, init = settings["class_path"], {"base": base, **settings.get("init_args", {})}
    if init["base"] == base and "tokenizer" not in init:
        init.setdefault("revision", model.get("revision"))
    names = [known for known in lit_peft.data.__all__ if known != "LitDataModule"]
    if name not in names:
        raise LitPeftError(f"data.class_path={name!r} is not known: the closest are {closest(name, names)}.")
    try:
        return getattr(lit_peft.data, name)(**init)
    except TypeError as problem:
        raise LitPeftError(f"data.init_args do not fit {name}: {first_line(problem)}") from problem


def make_module(cell: Cell) -> Any:
    """The LightningModule of a cell, its base not loaded yet."""
    import lit_peft

    cls = getattr(lit_peft, cell.method)
    return cls(base=cell.base, task=cell.task, learning_rate=cell.learning_rate, **cell.model)


def in_own_process(cell: Cell, device: int | None = None) -> dict[str, Any]:
    """Run a cell in a process of its own, so that its peak memory is its own; on a GPU of this number, if any."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        # The server imports the heavy packages once, and every run starts from there.
        context.set_forkserver_preload(["lit_peft.commands.preload"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(cell, send, device), daemon=True)
    process.start()
    send.close()
    try:
        result: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with status {process.exitcode} (-9: killed, mostly for want of memory)"}
    except KeyboardInterrupt:
        process.terminate()
        raise
    process.join()
    return result


def _child(cell: Cell, send: Any, device: int | None) -> None:
    try:
        result = measure(cell, device)
    except Exception as problem:
        result = {"error": f"{type(problem).__name__}: {first_line(problem)}"}
    send.send(result)
    send.close()


def measure(cell: Cell, device: int | None = None) -> dict[str, Any]:
    """Train one cell and measure it.

    Args:
        cell: what to train.
        device: number of the GPU to use, where the Trainer uses GPUs; any when None.

    Returns:
        `metric` and `mode`; `validation` and `test` (None without test rows) at the last step; `rows` evaluated on;
        `trainable` and `total` parameters; `steps` taken; `adapter_bytes`; `peak_memory_bytes`, on a GPU of its
        tensors, else of the process beyond what libraries and data take; `seconds_per_step`, the median; `curve`: step,
        seconds of training so far, validation metric.
    """
    import logging
    import warnings

    import torch
    from lightning.pytorch import Trainer, seed_everything

    from lit_peft.commands.recorder import Recorder
    from lit_peft.methods.attachment import trainable_parameters

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
    tested = "test" in data.rows
    if tested:
        data.setup("test")
    # The rows are drawn by now, the same for all; what a run's seed changes is the order of training.
    data.seed += cell.seed
    module = make_module(cell)
    module.take_labels(data)
    gc.collect()
    before = process_memory("VmRSS") or peak_memory() or 0
    recorder = Recorder(module.task.monitor[0])
    steps = cell.steps if cell.seconds is None else _steps_in(cell, device)
    settings: dict[str, Any] = {
        **_QUIET,
        "num_sanity_val_steps": 0,
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": -(-steps // cell.evaluations) * cell.accumulated,
        "check_val_every_n_epoch": None,
    }
    trainer = Trainer(**{**settings, **_on(cell, device)}, callbacks=[recorder])
    trainer.fit(module, datamodule=data)
    if not recorder.curve or recorder.curve[-1][0] < steps:
        trainer.validate(module, datamodule=data, verbose=False)
    cuda = trainer.strategy.root_device.type == "cuda"
    most = torch.cuda.max_memory_allocated() if cuda else max(0, (peak_memory() or 0) - before)
    test = None
    name = module.task.monitor[0].removeprefix("val_")
    if tested:
        test = float(trainer.test(module, datamodule=data, verbose=False)[0][f"test_{name}"])
    return {
        "metric": name,
        "mode": module.task.monitor[1],
        "validation": recorder.curve[-1][2],
        "test": test,
        "steps": steps,
        "rows": len(data.rows["test" if tested else "validation"]),
        "trainable": trainable_parameters(module.model),
        "total": sum(parameter.numel() for parameter in module.model.parameters()),
        "adapter_bytes": _adapter_bytes(module),
        "peak_memory_bytes": most,
        "seconds_per_step": recorder.seconds_per_step * cell.accumulated,
        "curve": recorder.curve,
        "device": str(trainer.strategy.root_device),
    }


def _on(cell: Cell, device: int | None) -> dict[str, Any]:
    """The Trainer's arguments of a cell on one device: the GPU of this number, or any single one."""
    import torch

    gpu = device is not None and torch.cuda.is_available() and cell.trainer.get("accelerator") != "cpu"
    return {"devices": [device] if gpu else 1, **cell.trainer}


def _steps_in(cell: Cell, device: int | None) -> int:
    """How many optimizer steps of this cell fit in its seconds, by the median of a few."""
    from lightning.pytorch import Trainer, seed_everything

    from lit_peft.commands.recorder import Recorder

    seed_everything(cell.seed, verbose=False)
    data = make_data(cell.base, cell.model, cell.data)
    data.setup("fit")
    module = make_module(cell)
    module.take_labels(data)
    recorder = Recorder(module.task.monitor[0], skip=_PROBED)
    quick = {"max_steps": 2 * _PROBED, "max_epochs": -1, "limit_val_batches": 0}
    Trainer(**{**_QUIET, **quick, **_on(cell, device)}, callbacks=[recorder]).fit(module, datamodule=data)
    return max(1, int((cell.seconds or 0) / (recorder.seconds_per_step * cell.accumulated)))


def _adapter_bytes(module: Any) -> int:
    """The bytes of the adapter's folder; of the trained tensors, where the method has no folder."""
    from lit_peft.formats.folder import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        try:
            saved = save_adapter(module.model, Path(folder) / "adapter")
        except LitPeftError:
            return sum(value.numel() * value.element_size() for value in module.state_dict().values())
        return sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
