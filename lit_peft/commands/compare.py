"""`lit-peft compare`: the methods on one base and one data set, at the same budget, each at its best learning rate."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from queue import Queue
from typing import Any

from lit_peft.commands.options import Options
from lit_peft.errors import LitPeftError, closest, first_line
from lit_peft.kinds import check_kinds, shown
from lit_peft.memory import held, peak

METHODS = (
    "FullFineTuning",
    "HeadOnly",
    "LoRA",
    "AdapterH",
    "AdapterP",
    "Parallel",
    "PrefixTuning",
    "PTuningV2",
    "PTuning",
    "PromptTuning",
)
RESULTS = "results.jsonl"
# Settings that the command line can give in place of the file.
_FLAGS = {
    "steps": int,
    "seconds": float,
    "evaluations": int,
    "seeds": int,
    "trials": int,
    "devices": int,
    "output": str,
}
# Steps by which a budget of seconds is turned into one of steps, after as many that are not counted.
_PROBED = 8


@dataclass(frozen=True)
class Plan:
    """What to compare, as the YAML file says it.

    Args:
        base: the base model, as in `lit-peft fit`.
        task: the task.
        data: `class_path` and `init_args` of the data module.
        methods: name of each method -> its settings; a `learning_rate` there is the middle of the search.
        model: settings of every method, e.g. `lr_scheduler`.
        trainer: arguments of the Trainer, e.g. `precision`.
        steps: optimizer steps of every run: the budget.
        seconds: seconds of training of every run instead: as many steps as fit, by the time of its first ones.
        evaluations: validations during a run, the last one at its end.
        seeds: runs of each method at its chosen learning rate: seeds 0, 1, ...
        trials: learning rates tried for each method, with seed 0; chosen on validation.
        spread: ratio between neighbouring learning rates.
        devices: runs at once, each on a device of its own; on the CPU they share its cores.
        reach: share of full fine-tuning's validation metric whose time is reported.
        output: folder of the results.

    Raises:
        LitPeftError: a value is out of range, or a method is not known.
    """

    base: str
    task: str
    data: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in METHODS})
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: int = 200
    seconds: float | None = None
    evaluations: int = 4
    seeds: int = 3
    trials: int = 3
    spread: float = 3.0
    devices: int = 1
    reach: float = 0.95
    output: str = "lit_peft_runs/compare"

    def __post_init__(self) -> None:
        for name in ("steps", "evaluations", "seeds", "trials", "devices"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LitPeftError(f"{name}={value!r}: give a whole number of at least 1.")
        if self.seconds is not None and not self.seconds > 0:
            raise LitPeftError(f"seconds={self.seconds}: give the seconds of training of each run, e.g. 60.")
        if not self.spread > 1:
            raise LitPeftError(f"spread={self.spread}: give the ratio of neighbouring learning rates, above 1, e.g. 3.")
        if not 0 < self.reach <= 1:
            raise LitPeftError(f"reach={self.reach}: give a share of full fine-tuning above 0 and at most 1.")
        for name in self.methods:
            if name not in METHODS:
                raise LitPeftError(
                    f"methods has {name!r}, which is not known: the closest are {closest(name, METHODS)}."
                )
        if not self.methods:
            raise LitPeftError("methods is empty: name at least one, or leave it out for all.")
        if "class_path" not in self.data:
            raise LitPeftError("data has no class_path: name a data module, e.g. class_path: TextClassificationData.")
        if not isinstance(self.data.get("init_args", {}), dict):
            raise LitPeftError(f"data.init_args={shown(self.data['init_args'])}: give a mapping of names to values.")

    @property
    def cells(self) -> int:
        """The number of runs."""
        return len(self.methods) * (self.trials + self.seeds - 1)


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
    def key(self) -> str:
        """A name that is the same for the same run, and for no other."""
        decides = {name: value for name, value in asdict(self).items() if value is not None}
        if self.seconds is not None:
            del decides["steps"]
        text = json.dumps(decides, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The finished runs of a file by their cell's key; a last line that is not whole is left out.

    Raises:
        LitPeftError: a line is no result.
    """
    text = file.read_bytes() if file.is_file() else b""
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].decode().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = row
        except (ValueError, KeyError, TypeError) as problem:
            raise LitPeftError(f"{file}, line {number} is no result of compare: remove it.") from problem
    return rows


class Results:
    """Finished runs as JSON lines, each appended whole; a line that a kill cut off is dropped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = read_results(file)
        text = file.read_bytes() if file.is_file() else b""
        whole = text.rfind(b"\n") + 1
        if whole != len(text):
            os.truncate(file, whole)

    def add(self, row: dict[str, Any]) -> None:
        """Append a run and bring it to the disk."""
        with self.file.open("ab") as handle:
            handle.write((json.dumps(row) + "\n").encode())
            handle.flush()
            os.fsync(handle.fileno())
        self.rows[row["cell"]] = row


def run(arguments: Sequence[str]) -> None:
    """Compare the methods as the command line says.

    Raises:
        LitPeftError: bad input; nothing is run then.
    """
    plan, report_only = _plan(arguments)
    if report_only:
        _report(plan)
        return
    _check(plan)
    from filelock import FileLock, Timeout

    from lit_peft.commands.report import write_report

    folder = Path(plan.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise LitPeftError(f"output={plan.output!r} is in use by another compare: wait, or give another.") from None
    with lock:
        results = Results(folder / RESULTS)
        rows = compare(plan, results)
        files = write_report(folder, plan, rows)
    _show(folder, files)


def _report(plan: Plan) -> None:
    """Write the report of the runs that are finished, which may be in the middle of a comparison."""
    from lit_peft.commands.report import write_report

    folder = Path(plan.output)
    if not (folder / RESULTS).is_file():
        raise LitPeftError(f"output={plan.output!r} has no {RESULTS}: give the folder of a comparison.")
    rows = finished(plan, read_results(folder / RESULTS))
    if not rows:
        raise LitPeftError(f"{folder / RESULTS} has no finished run of this configuration: give the one it is of.")
    _show(folder, write_report(folder, plan, rows))


def _show(folder: Path, files: Sequence[str]) -> None:
    print()
    print((folder / "report.md").read_text(encoding="utf-8"))
    print("results:  " + "  ".join(str(folder / name) for name in (RESULTS, *files)))


def finished(plan: Plan, known: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of this plan among those known by their cell's key, failed ones left out."""
    rows = []
    for method in plan.methods:
        cells = search(plan, method)
        chosen = best([known[cell.key] for cell in cells if cell.key in known])
        if chosen is not None:
            cells += [cell_of(plan, method, chosen["learning_rate"], seed) for seed in range(1, plan.seeds)]
        rows += [known[cell.key] for cell in cells if "error" not in known.get(cell.key, {"error": ""})]
    return rows


def compare(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """Run what is not finished; return the rows of this plan, those of the search included.

    Raises:
        LitPeftError: every run failed.
    """
    progress = _Progress(plan.cells, plan.devices)
    tried = _all(plan, [cell for method in plan.methods for cell in search(plan, method)], results, progress)
    chosen = {method: best([row for row in tried if row["method"] == method]) for method in plan.methods}
    progress.skip((plan.seeds - 1) * sum(row is None for row in chosen.values()))
    # Seed by seed, so that a comparison that is stopped has as many runs of one method as of another.
    cells = [
        cell_of(plan, method, row["learning_rate"], seed)
        for seed in range(1, plan.seeds)
        for method, row in chosen.items()
        if row is not None
    ]
    rows = [*tried, *_all(plan, cells, results, progress)]
    if all("error" in row for row in rows):
        raise LitPeftError(f"Every run failed; the first one with: {rows[0]['error']}")
    return rows


def _all(plan: Plan, cells: Sequence[Cell], results: Results, progress: _Progress) -> list[dict[str, Any]]:
    """The rows of these runs, in their order, as many at a time as there are devices."""
    if plan.devices == 1:
        return [_finished(cell, results, progress) for cell in cells]
    free: Queue[int] = Queue()
    for number in range(plan.devices):
        free.put(number)

    def on_a_free_one(cell: Cell) -> dict[str, Any]:
        device = free.get()
        try:
            return _finished(cell, results, progress, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(plan.devices) as pool:
        waiting = [pool.submit(on_a_free_one, cell) for cell in cells]
        try:
            return [one.result() for one in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def search(plan: Plan, method: str) -> list[Cell]:
    """The runs of the search: the usual learning rate, then those above and below it in turn."""
    usual = _usual_rate(plan, method)
    powers = [(trial + 1) // 2 * (1 if trial % 2 else -1) for trial in range(plan.trials)]
    return [cell_of(plan, method, float(f"{usual * plan.spread**power:.3g}"), 0) for power in powers]


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run with the best validation metric; None where all failed."""
    done = [row for row in rows if "error" not in row and row["validation"] == row["validation"]]
    if not done:
        return None
    return max(done, key=lambda row: row["validation"] if row["mode"] == "max" else -row["validation"])


def cell_of(plan: Plan, method: str, learning_rate: float, seed: int) -> Cell:
    """Make a run of the plan."""
    own = {name: value for name, value in plan.methods[method].items() if name != "learning_rate"}
    return Cell(
        method,
        learning_rate,
        seed,
        plan.base,
        plan.task,
        plan.data,
        {**plan.model, **own},
        plan.trainer,
        plan.steps,
        plan.evaluations,
        plan.seconds,
    )


def _usual_rate(plan: Plan, method: str) -> float:
    import lit_peft

    given = plan.methods[method].get("learning_rate")
    return float(given or getattr(lit_peft, method).settings_class.learning_rate)


def _plan(arguments: Sequence[str]) -> tuple[Plan, bool]:
    """The plan of a command line, and whether only a report is wanted."""
    parser = Options(prog="lit-peft compare", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file: base, task, data, methods, budget")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"only these: {', '.join(METHODS)}")
    for name, kind in _FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"in place of the file's {name}")
    parser.add_argument("--limit_train", type=int, help="at most this many training rows")
    parser.add_argument("--report_only", action="store_true", help="run nothing: report what is finished")
    given = parser.parse_args(list(arguments))
    values = _read_yaml(Path(given.config), [item.name for item in fields(Plan)])
    missing = [name for name in ("base", "task", "data") if name not in values]
    if missing:
        raise LitPeftError(f"{given.config} lacks {', '.join(missing)}: see configs/compare.yaml.")
    if isinstance(values.get("methods"), dict):
        # YAML reads a name with nothing behind it as null.
        values["methods"] = {name: settings or {} for name, settings in values["methods"].items()}
    check_kinds(Plan, values, f"{given.config}: ")
    if given.methods:
        file = values.get("methods", {})
        values["methods"] = {name: file.get(name, {}) for name in given.methods}
    for name in _FLAGS:
        if getattr(given, name) is not None:
            values[name] = getattr(given, name)
    if given.limit_train is not None:
        values["data"].setdefault("init_args", {})["limit_train"] = given.limit_train
    return Plan(**values), given.report_only


def _read_yaml(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a YAML file of these keys.

    Raises:
        LitPeftError: it is not there, is no mapping, or has another key.
    """
    from ruamel.yaml import YAML, YAMLError

    if not file.is_file():
        raise LitPeftError(f"--config {str(file)!r} does not exist: give a YAML file, e.g. configs/compare.yaml.")
    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as problem:
        raise LitPeftError(f"{file} is no YAML: {first_line(problem)}") from problem
    if not isinstance(values, dict):
        raise LitPeftError(f"{file} is no mapping of keys to values: see configs/compare.yaml.")
    for key in values:
        if key not in keys:
            raise LitPeftError(f"{file} has the key {key!r}, which is not known: the closest are {closest(key, keys)}.")
    return values


def _check(plan: Plan) -> None:
    """Find what is wrong with data and methods before anything is run or written."""
    data = _data(plan.base, plan.data)
    data.setup("fit")
    if "validation" not in data.rows:
        raise LitPeftError("The data has no validation rows, by which the learning rate is chosen: set validation.")
    for method in plan.methods:
        module = _module(cell_of(plan, method, 1e-3, 0))
        module.take_labels(data)
        try:
            module.check()
        except LitPeftError as problem:
            raise LitPeftError(f"{method}: {problem}") from problem


def _data(base: str, settings: Mapping[str, Any]) -> Any:
    import lit_peft.data

    name, init = settings["class_path"], {"base": base, **settings.get("init_args", {})}
    names = [known for known in lit_peft.data.__all__ if known != "LitDataModule"]
    if name not in names:
        raise LitPeftError(f"data.class_path={name!r} is not known: the closest are {closest(name, names)}.")
    try:
        return getattr(lit_peft.data, name)(**init)
    except TypeError as problem:
        raise LitPeftError(f"data.init_args do not fit {name}: {first_line(problem)}") from problem


def _module(cell: Cell) -> Any:
    import lit_peft

    cls = getattr(lit_peft, cell.method)
    return cls(base=cell.base, task=cell.task, learning_rate=cell.learning_rate, **cell.model)


class _Progress:
    """A line or two for each run: which, how it went, and how long the rest may take."""

    def __init__(self, total: int, devices: int = 1) -> None:
        self.total, self.devices, self.done, self.ran, self.spent = total, devices, 0, 0, 0.0

    def skip(self, count: int) -> None:
        self.total -= count

    def start(self, cell: Cell) -> None:
        if self.devices == 1:
            print(f"[{self.done + 1}/{self.total}] {_title(cell)} ...", end="", flush=True)

    def end(self, cell: Cell, row: Mapping[str, Any], seconds: float | None) -> None:
        self.done += 1
        said = f"failed: {row['error']}" if "error" in row else f"val_{row['metric']} {row['validation']:.4f}"
        head = f"[{self.done}/{self.total}] {_title(cell)}:"
        if seconds is None:
            print(f"{head} {said} (finished before)", flush=True)
            return
        self.ran, self.spent = self.ran + 1, self.spent + seconds
        left = self.spent / self.ran * (self.total - self.done) / self.devices
        head = "" if self.devices == 1 else head
        print(f"{head} {said} ({seconds:.0f} s; at most {left / 60:.0f} min left)", flush=True)


def _title(cell: Cell) -> str:
    return f"{cell.method}, learning rate {cell.learning_rate:g}, seed {cell.seed}"


_TURN = threading.Lock()


def _finished(cell: Cell, results: Results, progress: _Progress, device: int | None = None) -> dict[str, Any]:
    """The row of a run, which is run if it is not finished; one that failed is tried again."""
    row = results.rows.get(cell.key)
    if row is not None and "error" not in row:
        with _TURN:
            progress.end(cell, row, None)
        return row
    progress.start(cell)
    start = time.perf_counter()
    head = {"cell": cell.key, "method": cell.method, "learning_rate": cell.learning_rate, "seed": cell.seed}
    row = {**head, **_in_process(cell, device)}
    with _TURN:
        results.add(row)
        progress.end(cell, row, time.perf_counter() - start)
    return row


def _in_process(cell: Cell, device: int | None = None) -> dict[str, Any]:
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
    data = _data(cell.base, cell.data)
    data.setup("fit")
    tested = "test" in data.rows
    if tested:
        data.setup("test")
    # The rows are drawn by now, the same for all; what a run's seed changes is the order of training.
    data.seed += cell.seed
    module = _module(cell)
    module.take_labels(data)
    gc.collect()
    before = held("VmRSS") or peak() or 0
    recorder = Recorder(module.task.monitor[0])
    accumulated = int(cell.trainer.get("accumulate_grad_batches", 1))
    steps = cell.steps if cell.seconds is None else _steps_in(cell, device)
    settings: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": -(-steps // cell.evaluations) * accumulated,
        "check_val_every_n_epoch": None,
    }
    trainer = Trainer(**{**settings, **_on(cell, device)}, callbacks=[recorder])
    trainer.fit(module, datamodule=data)
    if not recorder.curve or recorder.curve[-1][0] < steps:
        trainer.validate(module, datamodule=data, verbose=False)
    cuda = trainer.strategy.root_device.type == "cuda"
    most = torch.cuda.max_memory_allocated() if cuda else max(0, (peak() or 0) - before)
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
        "seconds_per_step": recorder.seconds_per_step * accumulated,
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
    data = _data(cell.base, cell.data)
    data.setup("fit")
    module = _module(cell)
    module.take_labels(data)
    recorder = Recorder(module.task.monitor[0], skip=_PROBED)
    accumulated = int(cell.trainer.get("accumulate_grad_batches", 1))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quick = {"max_steps": 2 * _PROBED, "max_epochs": -1, "limit_val_batches": 0}
    Trainer(**{**quiet, **quick, **_on(cell, device)}, callbacks=[recorder]).fit(module, datamodule=data)
    return max(1, int((cell.seconds or 0) / (recorder.seconds_per_step * accumulated)))


def _adapter_bytes(module: Any) -> int:
    """The bytes of the adapter's folder; of the trained tensors, where the method has no folder."""
    from lit_peft.formats.folder import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        try:
            saved = save_adapter(module.model, Path(folder) / "adapter")
        except LitPeftError:
            return sum(value.numel() * value.element_size() for value in module.state_dict().values())
        return sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
