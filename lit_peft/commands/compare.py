"""`lit-peft compare`: the methods on one base and one data set, at the same budget, each at its best learning rate."""

from __future__ import annotations

import inspect
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from queue import Queue
from typing import Any

from lit_peft.commands.measure import Cell, in_own_process, make_data, make_module
from lit_peft.commands.options import Options
from lit_peft.util.errors import LitPeftError, closest, first_line
from lit_peft.util.type_checks import brief, check_types

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

# What a comparison says itself, of the arguments of every module and of the Trainer.
_OWN_MODEL = ("base", "task", "learning_rate")
_OWN_TRAINER = (
    *("max_steps", "min_steps", "max_epochs", "min_epochs", "max_time", "fast_dev_run", "overfit_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "callbacks", "devices", "num_nodes"),
)


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
        for part, given, own in (("model", self.model, _OWN_MODEL), ("trainer", self.trainer, _OWN_TRAINER)):
            for name in own:
                if name in given:
                    raise LitPeftError(f"{part} has {name!r}, which the comparison sets for each run: leave it out.")
        if "class_path" not in self.data:
            raise LitPeftError("data has no class_path: name a data module, e.g. class_path: TextClassificationData.")
        if not isinstance(self.data.get("init_args", {}), dict):
            raise LitPeftError(f"data.init_args={brief(self.data['init_args'])}: give a mapping of names to values.")

    @property
    def cells(self) -> int:
        """The number of runs."""
        return len(self.methods) * (self.trials + self.seeds - 1)


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
    check_types(Plan, values, f"{given.config}: ")
    if given.methods:
        file = values.get("methods", {})
        values["methods"] = {name: file.get(name, {}) for names in given.methods for name in names.split(",")}
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
    """Find what is wrong with data, methods and the Trainer's arguments before anything is run or written."""
    from lightning.pytorch import Trainer

    known = inspect.signature(Trainer).parameters
    for name in plan.trainer:
        if name not in known:
            raise LitPeftError(f"trainer has {name!r}, which is not known: the closest are {closest(name, known)}.")
    data = make_data(plan.base, plan.model, plan.data)
    data.setup("fit")
    if "validation" not in data.rows:
        raise LitPeftError("The data has no validation rows, by which the learning rate is chosen: set validation.")
    for method in plan.methods:
        module = make_module(cell_of(plan, method, 1e-3, 0))
        module.take_labels(data)
        try:
            module.check()
        except LitPeftError as problem:
            raise LitPeftError(f"{method}: {problem}") from problem


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
    row = {**head, **in_own_process(cell, device)}
    with _TURN:
        results.add(row)
        progress.end(cell, row, time.perf_counter() - start)
    return row
