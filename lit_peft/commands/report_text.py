"""The text of a comparison's report: the verdict, the table, and what was run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_peft.commands.plan import Plan
from lit_peft.commands.summary import FULL, HEAD, Summary, difference

# What counts as close to full fine-tuning, and as few parameters, in percent.
_CLOSE, _FEW = 0.02, 5.0


def verdict(found: Sequence[Summary]) -> list[str]:
    """Return what the figures show, and what they do not show: one or two sentences per point."""
    if not found:
        return ["No method finished."]
    by_name = {summary.method: summary for summary in found}
    methods = [summary for summary in found if summary.method not in (FULL, HEAD)]
    points = _best(methods) if len(methods) > 1 else []
    for name, reference in ((FULL, "full fine-tuning"), (HEAD, "training the head alone")):
        if name in by_name and methods:
            points += _against(methods, by_name[name], reference)
    accuracy = found[0].is_accuracy
    if FULL in by_name and methods and accuracy:
        close = [one for one in methods if one.mean >= by_name[FULL].mean - _CLOSE and one.share < _FEW]
        names = f": {', '.join(one.method for one in close)}" if close else ""
        points.append(
            f"{len(close)} of {len(methods)} methods are at most {100 * _CLOSE:g} points below full fine-tuning with "
            f"less than {_FEW:g} % of its parameters{names}."
        )
    if all(len(one.values) < 2 for one in found):
        noise = "only the sampling error of the evaluated rows is known" if accuracy else "the noise is unknown"
        points.append(f"Each method ran with one seed: {noise}. Run more seeds before choosing between close methods.")
    edges = [one.method for one in found if one.edge]
    if edges:
        points.append(
            f"For {', '.join(edges)} the best learning rate is the lowest or highest tried: more trials may help."
        )
    return points


def _best(methods: Sequence[Summary]) -> list[str]:
    """Whether the first method is better than the others."""
    first, rest = methods[0], methods[1:]
    close = [one for one in rest if difference(first, one).within_noise]
    if not all(difference(first, one).significant for one in rest if one not in close):
        return [f"{first.method} has the best {first.metric}; the noise of the differences is unknown."]
    if not close:
        return [f"{first.method} has the best {first.metric}, and its lead over every other method is above noise."]
    names = ", ".join(one.method for one in close)
    points = [f"{first.method} has the best {first.metric}, but its lead over {names} is within noise."]
    least = min([first, *close], key=lambda one: one.trainable)
    if least is not first:
        points.append(f"Of those, {least.method} trains the fewest parameters: {least.share:.2f} %.")
    return points


def _against(methods: Sequence[Summary], reference: Summary, name: str) -> list[str]:
    """The differences to a baseline, grouped by whether they are above noise."""
    groups: dict[str, list[str]] = {"above noise": [], "within noise": [], "noise unknown": []}
    for one in methods:
        gap = difference(one, reference)
        group = "above noise" if gap.significant else "within noise" if gap.within_noise else "noise unknown"
        groups[group].append(f"{one.method} {gap.value:+.3f}")
    return [f"Against {name}, {group}: {'; '.join(gaps)}." for group, gaps in groups.items() if gaps]


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
    """Return the rows of the table as text, the heading first."""
    metric = found[0].metric if found else "metric"
    headings = {"METRIC": metric, "REACH": f"time to {100 * plan.reach:g} % of full"}
    return [
        [headings.get(name, name) for name in _COLUMNS],
        *([text(one) for text in _COLUMNS.values()] for one in found),
    ]


def notes(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return paragraphs on what was run, what the columns mean, and which runs failed."""
    finished = [row for row in rows if "error" not in row]
    failed = [f"{row['method']} at {row['learning_rate']:g}: {row['error']}" for row in rows if "error" in row]
    first = finished[0] if finished else {}
    steps = f"{plan.steps} steps"
    if plan.seconds is not None:
        taken = [row["steps"] for row in finished]
        steps = f"the steps that fit in {plan.seconds:g} s of training ({min(taken):,} to {max(taken):,})"
    data = f", data with the hash {plan.data_hash}" if plan.data_hash else ""
    return [
        *([f"Not finished: {len(finished)} of {plan.total_cells} runs."] if len(finished) < plan.total_cells else []),
        f"Base {plan.base}, task {plan.task}{data}. Every run takes {steps} and reports the metric of its last step. "
        f"Learning rates tried for each method: {plan.trials}, chosen on validation with seed 0. Seeds: {plan.seeds}; "
        f"a seed determines the initialization and the order of the training data. "
        f"Evaluated on {first.get('rows', 0):,} rows, on {first.get('device', '?')}.",
        "± is the standard deviation over the seeds. Peak memory is what the process of a run uses beyond libraries "
        "and data (on a GPU: the memory of its tensors). Times are of training alone, without validation. Time to "
        f"{100 * plan.reach:g} % of full: until the validation metric reaches that share of full fine-tuning's; — if "
        "it never does.",
        *(f"Failed: {text}." for text in failed),
    ]


def markdown(plan: Plan, found: Sequence[Summary], rows: Sequence[dict[str, Any]]) -> str:
    """Return the report as Markdown."""
    head, *body = table(plan, found)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    points = "\n".join(f"- {point}" for point in verdict(found))
    return f"# Comparison of methods\n\n{points}\n\n{text}\n\n" + "\n\n".join(notes(plan, rows)) + "\n"
