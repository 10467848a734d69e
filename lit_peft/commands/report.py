"""The report of `lit-peft compare`: its figures, its table, and a verdict that knows about noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_peft.commands.compare import Plan

# Student's t, two-sided 95 %, by degrees of freedom; for more than those here, that of the most: a little wider.
_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
_NORMAL = 1.96
# What counts as close to full fine-tuning, and as few parameters, in percent.
_CLOSE, _FEW = 0.02, 5.0
FULL, HEAD = "FullFineTuning", "HeadOnly"


@dataclass(frozen=True)
class Summary:
    """One method: its runs at the learning rate that validation chose.

    Attributes:
        values: the reported metric of each seed, by seed.
        edge: whether the chosen learning rate is the lowest or highest of three or more that were tried.
        curve: step, seconds of training and validation metric, the mean over the seeds.
        reached: seconds of training to the wanted share of full fine-tuning; None: not reached, or unknown.
    """

    method: str
    metric: str
    mode: str
    learning_rate: float
    edge: bool
    values: dict[int, float]
    rows: int
    trainable: int
    total: int
    adapter_bytes: int
    peak_memory_bytes: int
    seconds_per_step: float
    curve: list[list[float]]
    reached: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float:
        """The standard deviation over the seeds; nan for one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    @property
    def share(self) -> float:
        """The trained parameters in percent of all."""
        return 100 * self.trainable / self.total


@dataclass(frozen=True)
class Difference:
    """A method's metric less another's, and the half-width of its 95 % interval; nan where nothing tells it."""

    value: float
    noise: float

    @property
    def real(self) -> bool:
        """Whether it is above noise."""
        return abs(self.value) > self.noise  # False for nan, too

    @property
    def alike(self) -> bool:
        """Whether it is within noise."""
        return abs(self.value) <= self.noise


def summarize(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """Return each method's summary, the best first; methods all of whose runs failed are left out."""
    from lit_peft.commands.compare import best

    found = []
    for method in plan.methods:
        done = [row for row in rows if row["method"] == method and "error" not in row]
        chosen = best([row for row in done if row["seed"] == 0])
        if chosen is None:
            continue
        tried = {row["learning_rate"] for row in done}
        runs = [row for row in done if row["learning_rate"] == chosen["learning_rate"]]
        rate = chosen["learning_rate"]
        found.append(
            Summary(
                method=method,
                metric=("test_" if chosen["test"] is not None else "val_") + chosen["metric"],
                mode=chosen["mode"],
                learning_rate=rate,
                edge=len(tried) > 2 and rate in (min(tried), max(tried)),
                values={row["seed"]: row["validation" if row["test"] is None else "test"] for row in runs},
                rows=chosen["rows"],
                trainable=chosen["trainable"],
                total=chosen["total"],
                adapter_bytes=chosen["adapter_bytes"],
                peak_memory_bytes=max(row["peak_memory_bytes"] for row in runs),
                seconds_per_step=statistics.median(row["seconds_per_step"] for row in runs),
                curve=_mean_curve([row["curve"] for row in runs]),
            )
        )
    full = next((one for one in found if one.method == FULL), None)
    reached = [Summary(**{**vars(one), "reached": _reached(one, full, plan.reach)}) for one in found]
    return sorted(reached, key=lambda one: one.mean, reverse=bool(found) and found[0].mode == "max")


def _mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """The mean of curves point by point, counted from their ends: runs of a time budget differ in their steps."""
    shared = min(map(len, curves))
    points = zip(*(curve[-shared:] for curve in curves), strict=True)
    return [[statistics.fmean(values) for values in zip(*point, strict=True)] for point in points]


def _reached(one: Summary, full: Summary | None, share: float) -> float | None:
    if full is None:
        return None
    goal = full.curve[-1][2]
    for _, seconds, value in one.curve:
        if value >= share * goal if one.mode == "max" else value <= goal / share:
            return seconds
    return None


def difference(one: Summary, other: Summary) -> Difference:
    """Compare two methods over the seeds they share.

    The noise is the larger one of: the paired t interval over the seeds, and for a share of right answers the sampling
    error of the rows evaluated on, taken as independent (which is on the careful side: they are the same rows).
    """
    seeds = sorted(one.values.keys() & other.values.keys())
    paired = [one.values[seed] - other.values[seed] for seed in seeds]
    noise = []
    if len(paired) > 1:
        factor = _T[min(len(paired) - 1, max(_T))]
        noise.append(factor * statistics.stdev(paired) / math.sqrt(len(paired)))
    if _is_accuracy(one):
        noise.append(_NORMAL * math.sqrt(sum(x.mean * (1 - x.mean) for x in (one, other)) / one.rows))
    return Difference(statistics.fmean(paired), max(noise, default=math.nan))


def _is_accuracy(one: Summary) -> bool:
    """Whether the metric is a share of right answers, whose sampling error the number of rows tells."""
    return one.metric.endswith("accuracy")


def verdict(found: Sequence[Summary]) -> list[str]:
    """Say what the numbers show, and what they do not, one sentence or two for each point."""
    if not found:
        return ["No method finished."]
    by_name = {one.method: one for one in found}
    methods = [one for one in found if one.method not in (FULL, HEAD)]
    said = []
    if len(methods) > 1:
        first, rest = methods[0], methods[1:]
        alike = [one for one in rest if difference(first, one).alike]
        if not all(difference(first, one).real for one in rest if one not in alike):
            said.append(f"{first.method} has the best {first.metric}; the noise of the differences is not known.")
        elif alike:
            names = ", ".join(one.method for one in alike)
            said.append(f"{first.method} has the best {first.metric}, but the differences to {names} are within noise.")
            least = min([first, *alike], key=lambda one: one.trainable)
            if least is not first:
                said.append(f"Of those, {least.method} trains the fewest parameters: {least.share:.2f} %.")
        else:
            said.append(
                f"{first.method} has the best {first.metric}, and the difference to every other is above noise."
            )
    for name, what in ((FULL, "full fine-tuning"), (HEAD, "training the head alone")):
        if name in by_name and methods:
            gaps = [(one, difference(one, by_name[name])) for one in methods]
            real = "; ".join(f"{one.method} {gap.value:+.3f}" for one, gap in gaps if gap.real)
            within = "; ".join(f"{one.method} {gap.value:+.3f}" for one, gap in gaps if gap.alike)
            unknown = "; ".join(f"{one.method} {gap.value:+.3f}" for one, gap in gaps if not gap.real and not gap.alike)
            said += [f"Against {what}, above noise: {real}."] if real else []
            said += [f"Against {what}, within noise: {within}."] if within else []
            said += [f"Against {what}, with noise that is not known: {unknown}."] if unknown else []
    known = _is_accuracy(found[0])
    if FULL in by_name and methods and known:
        close = [x for x in methods if x.mean >= by_name[FULL].mean - _CLOSE and x.share < _FEW]
        names = f": {', '.join(one.method for one in close)}" if close else ""
        said.append(
            f"{len(close)} of {len(methods)} methods are within {100 * _CLOSE:g} points of full fine-tuning, or "
            f"above it, at less than {_FEW:g} % of its parameters{names}."
        )
    if all(len(one.values) < 2 for one in found):
        how = "only the sampling error of the evaluated rows is known" if known else "the noise is not known"
        said.append(f"One seed each: {how}; run more seeds before choosing between close methods.")
    edges = [one.method for one in found if one.edge]
    if edges:
        said.append(
            f"The best learning rate is at the edge of those tried for {', '.join(edges)}: more trials may help."
        )
    return said


_COLUMNS: dict[str, Callable[[Summary], str]] = {
    "method": lambda one: one.method,
    "METRIC": lambda one: f"{one.mean:.4f}" + (f" ± {one.std:.4f}" if len(one.values) > 1 else ""),
    "seeds": lambda one: str(len(one.values)),
    "trainable": lambda one: f"{one.trainable:,}",
    "%": lambda one: f"{one.share:.3f}",
    "adapter": lambda one: f"{one.adapter_bytes / 1000:,.1f} kB",
    "peak memory": lambda one: f"{one.peak_memory_bytes / 2**20:,.0f} MiB",
    "time per step": lambda one: f"{1000 * one.seconds_per_step:,.1f} ms",
    "REACH": lambda one: "—" if one.reached is None else f"{one.reached:,.1f} s",
    "learning rate": lambda one: f"{one.learning_rate:g}",
}


def table(plan: Plan, found: Sequence[Summary]) -> list[list[str]]:
    """The table's rows of text, the heading first."""
    metric = found[0].metric if found else "metric"
    named = {"METRIC": metric, "REACH": f"time to {100 * plan.reach:g} % of full"}
    return [
        [named.get(name, name) for name in _COLUMNS],
        *([show(one) for show in _COLUMNS.values()] for one in found),
    ]


def setting(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was run, and what the columns mean."""
    failed = [f"{row['method']} at {row['learning_rate']:g}: {row['error']}" for row in rows if "error" in row]
    done = next((row for row in rows if "error" not in row), {})
    steps = f"{plan.steps} steps"
    if plan.seconds is not None:
        taken = [row["steps"] for row in rows if "error" not in row]
        steps = f"the steps that fit in {plan.seconds:g} s of training ({min(taken):,} to {max(taken):,})"
    ran = sum("error" not in row for row in rows)
    return [
        *([f"Not finished: {ran} of {plan.cells} runs."] if ran < plan.cells else []),
        f"Base {plan.base}, task {plan.task}; {steps} for every run, the metric is that of the last step; "
        f"{plan.trials} learning rate(s) each, chosen on validation with seed 0; {plan.seeds} seed(s), which set the "
        f"start and the order of training; evaluated on {done.get('rows', 0):,} rows, on {done.get('device', '?')}.",
        "± is the standard deviation over seeds. Peak memory is what a run of its own process takes beyond libraries "
        "and data (on a GPU: its tensors). Time is of training alone, without validation. "
        f"Time to {100 * plan.reach:g} % of full: until the validation metric is there; — if it never is.",
        *(f"Failed: {text}." for text in failed),
    ]


def markdown(plan: Plan, found: Sequence[Summary], rows: Sequence[dict[str, Any]]) -> str:
    """The report as Markdown."""
    head, *body = table(plan, found)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    said = "\n".join(f"- {point}" for point in verdict(found))
    return f"# Comparison of methods\n\n{said}\n\n{text}\n\n" + "\n\n".join(setting(plan, rows)) + "\n"


def write_report(folder: Path, plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write `report.md`, `report.html` and the plots; return the files' names."""
    from lit_peft.commands.figures import plots
    from lit_peft.commands.page import page

    found = summarize(plan, rows)
    (folder / "report.md").write_text(markdown(plan, found, rows), encoding="utf-8")
    figures = plots(plan, found) if found else {}
    names = ["report.md", "report.html"]
    if found and not figures:
        print("no plots: they need matplotlib, pip install 'lit-peft[plots]'")
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{name}.{kind}", dpi=150)
            names.append(f"{name}.{kind}")
    (folder / "report.html").write_text(page(plan, found, rows, figures), encoding="utf-8")
    return names
