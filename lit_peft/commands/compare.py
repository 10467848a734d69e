"""`lit-peft compare`: all methods on one base and data set, with the same budget, each at its best learning rate."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from queue import Queue
from typing import Any

from lit_peft.commands.measure import hash_of_data, make_data, make_module, measure_in_process
from lit_peft.commands.options import Options
from lit_peft.commands.plan import Cell, Plan, make_cell, search_cells
from lit_peft.commands.report import write_report
from lit_peft.commands.results import RESULTS, Results, best_row, finished_rows, left_out, newest_data, read_results
from lit_peft.methods.registry import METHODS
from lit_peft.util.errors import LitPeftError, closest, first_line
from lit_peft.util.quiet import quiet_run
from lit_peft.util.type_checks import check_types

# Keys of the file that an option overrides.
_OPTIONS = {
    "steps": int,
    "seconds": float,
    "evaluations": int,
    "seeds": int,
    "trials": int,
    "devices": int,
    "output": str,
}


def run(arguments: Sequence[str]) -> None:
    """Run the comparison that the command line describes, and write its report.

    Raises:
        LitPeftError: the input is wrong. Nothing is run then.
    """
    quiet_run()
    plan, report_only = read_plan(arguments)
    if report_only:
        _report_finished(plan)
        return
    plan = check_plan(plan)
    from filelock import FileLock, Timeout

    folder = Path(plan.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise LitPeftError(
            f"output={plan.output!r} is in use by another comparison: wait for it, or give another folder."
        ) from None
    with lock:
        results = Results(folder / RESULTS)
        _say_left_out(plan, results.rows)
        rows = compare(plan, results)
        names = write_report(folder, plan, rows)
    _print_report(folder, names)


def _report_finished(plan: Plan) -> None:
    """Write the report of the runs that are finished; the comparison may be running."""
    folder = Path(plan.output)
    if not (folder / RESULTS).is_file():
        raise LitPeftError(f"output={plan.output!r} has no {RESULTS}: give the folder of a comparison.")
    known = read_results(folder / RESULTS)
    # The data itself may be on another machine, so its latest hash is taken.
    plan = replace(plan, data_hash=newest_data(known))
    rows = finished_rows(plan, known)
    if not rows:
        raise LitPeftError(f"{folder / RESULTS} has no finished run of this configuration: give the right --config.")
    _say_left_out(plan, known)
    _print_report(folder, write_report(folder, plan, rows))


def _say_left_out(plan: Plan, rows: Mapping[str, dict[str, Any]]) -> None:
    """Print which finished runs are not compared because they had other data."""
    if sentence := left_out(plan, rows):
        print(sentence, flush=True)


def _print_report(folder: Path, names: Sequence[str]) -> None:
    print()
    print((folder / "report.md").read_text(encoding="utf-8"))
    print("results:  " + "  ".join(str(folder / name) for name in (RESULTS, *names)))


def compare(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """Run whatever is not finished.

    Args:
        plan: what to run.
        results: the finished runs; new ones are added.

    Returns:
        The rows of all runs of the plan, including those of the search.

    Raises:
        LitPeftError: every run failed.
    """
    progress = _Progress(plan.total_cells, plan.devices)
    search = [cell for method in plan.methods for cell in search_cells(plan, method)]
    tried = _run_all(plan, search, results, progress)
    chosen = {method: best_row([row for row in tried if row["method"] == method]) for method in plan.methods}
    progress.skip((plan.seeds - 1) * sum(row is None for row in chosen.values()))
    # Seed by seed: a comparison that is stopped early has equally many runs of every method.
    cells = [
        make_cell(plan, method, row["learning_rate"], seed)
        for seed in range(1, plan.seeds)
        for method, row in chosen.items()
        if row is not None
    ]
    rows = [*tried, *_run_all(plan, cells, results, progress)]
    if all("error" in row for row in rows):
        raise LitPeftError(f"Every run failed. The first error: {rows[0]['error']}")
    return rows


def _run_all(plan: Plan, cells: Sequence[Cell], results: Results, progress: _Progress) -> list[dict[str, Any]]:
    """Run the cells, as many at a time as there are devices; return their rows in order."""
    if plan.devices == 1:
        return [_row_of(cell, results, progress) for cell in cells]
    free: Queue[int] = Queue()
    for index in range(plan.devices):
        free.put(index)

    def run_on_free_device(cell: Cell) -> dict[str, Any]:
        device = free.get()
        try:
            return _row_of(cell, results, progress, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(plan.devices) as pool:
        futures = [pool.submit(run_on_free_device, cell) for cell in cells]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_LOCK = threading.Lock()


def _row_of(cell: Cell, results: Results, progress: _Progress, device: int | None = None) -> dict[str, Any]:
    """Return the row of a run, which is run if it is not finished. A run that failed is tried again."""
    row = results.rows.get(cell.key)
    if row is not None and "error" not in row:
        with _LOCK:
            progress.end(cell, row, None)
        return row
    progress.start(cell)
    start = time.perf_counter()
    head = {"cell": cell.key, "method": cell.method, "learning_rate": cell.learning_rate, "seed": cell.seed}
    head["data_hash"] = cell.data_hash
    row = {**head, **measure_in_process(cell, device)}
    with _LOCK:
        results.add(row)
        progress.end(cell, row, time.perf_counter() - start)
    return row


class _Progress:
    """Prints a line or two per run: which one, its result, and how long the rest may take."""

    def __init__(self, total: int, devices: int = 1) -> None:
        self.total, self.devices = total, devices
        self.finished, self.measured, self.seconds = 0, 0, 0.0

    def skip(self, count: int) -> None:
        self.total -= count

    def start(self, cell: Cell) -> None:
        if self.devices == 1:
            print(f"[{self.finished + 1}/{self.total}] {cell.title} ...", end="", flush=True)

    def end(self, cell: Cell, row: Mapping[str, Any], seconds: float | None) -> None:
        self.finished += 1
        result = f"failed: {row['error']}" if "error" in row else f"val_{row['metric']} {row['validation']:.4f}"
        head = f"[{self.finished}/{self.total}] {cell.title}:"
        if seconds is None:
            print(f"{head} {result} (finished before)", flush=True)
            return
        self.measured, self.seconds = self.measured + 1, self.seconds + seconds
        left = self.seconds / self.measured * (self.total - self.finished) / self.devices
        head = "" if self.devices == 1 else head
        print(f"{head} {result} ({seconds:.0f} s; at most {left / 60:.0f} min left)", flush=True)


def read_plan(arguments: Sequence[str]) -> tuple[Plan, bool]:
    """Read the command line; return the plan, and whether only a report is asked for.

    Raises:
        LitPeftError: the file or an option is wrong.
    """
    parser = Options(prog="lit-peft compare", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file: base, task, data, methods, budget")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"only these: {', '.join(METHODS)}")
    for name, kind in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"overrides {name} of the file")
    parser.add_argument("--limit_train", type=int, help="use at most this many training rows")
    parser.add_argument("--report_only", action="store_true", help="run nothing, only report the finished runs")
    options = parser.parse_args(list(arguments))
    values = _read_yaml(Path(options.config), [item.name for item in fields(Plan) if item.name != "data_hash"])
    missing = [name for name in ("base", "task", "data") if name not in values]
    if missing:
        raise LitPeftError(f"{options.config} lacks {', '.join(missing)}: see configs/compare.yaml.")
    if isinstance(values.get("methods"), dict):
        # YAML reads a name without a value as null.
        values["methods"] = {name: settings or {} for name, settings in values["methods"].items()}
    check_types(Plan, values, f"{options.config}: ")
    if options.methods:
        settings = values.get("methods", {})
        names = [name for part in options.methods for name in part.split(",")]
        values["methods"] = {name: settings.get(name, {}) for name in names}
    for name in _OPTIONS:
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    if options.limit_train is not None:
        values["data"].setdefault("init_args", {})["limit_train"] = options.limit_train
    return Plan(**values), options.report_only


def _read_yaml(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a YAML file that has only these keys.

    Raises:
        LitPeftError: the file is missing, is not a mapping, or has another key.
    """
    from ruamel.yaml import YAML, YAMLError

    if not file.is_file():
        raise LitPeftError(f"--config {str(file)!r} does not exist: give a YAML file, e.g. configs/compare.yaml.")
    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as problem:
        raise LitPeftError(f"{file} is not valid YAML: {first_line(problem)}") from problem
    if not isinstance(values, dict):
        raise LitPeftError(f"{file} is not a mapping of keys to values: see configs/compare.yaml.")
    for key in values:
        if key not in keys:
            raise LitPeftError(f"{file} has the unknown key {key!r}: the closest are {closest(key, keys)}.")
    return values


def check_plan(plan: Plan) -> Plan:
    """Check data, methods and the Trainer's arguments before anything is run or written.

    Returns:
        The plan with the hash of its data.

    Raises:
        LitPeftError: something is wrong with them.
    """
    from lightning.pytorch import Trainer

    known = inspect.signature(Trainer).parameters
    for name in plan.trainer:
        if name not in known:
            raise LitPeftError(f"trainer has {name!r}, which is unknown: the closest are {closest(name, known)}.")
    data = make_data(plan.base, plan.model, plan.data)
    data.setup("fit")
    for line in data.report():
        print(f"data: {line}", flush=True)
    if "validation" not in data.rows:
        raise LitPeftError("The data has no validation rows, which choose the learning rate: set validation.")
    for method in plan.methods:
        module = make_module(make_cell(plan, method, 1e-3, 0))
        module.take_labels(data)
        try:
            module.check()
        except LitPeftError as problem:
            raise LitPeftError(f"{method}: {problem}") from problem
    return replace(plan, data_hash=hash_of_data(data))
