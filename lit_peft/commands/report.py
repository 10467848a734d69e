"""The report of `lit-peft compare`: table, plots, one HTML file, and a verdict that knows about noise."""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_peft.commands.compare import Plan

# Student's t, two-sided 95 %, by degrees of freedom; beyond those here, the normal distribution's.
_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
_NORMAL = 1.96
_FULL, _HEAD = "FullFineTuning", "HeadOnly"
# Stands for the page's text color until the plot is in the page.
_INK = "#010203"


@dataclass(frozen=True)
class Summary:
    """One method: its runs at the learning rate that validation chose.

    Attributes:
        values: the reported metric of each seed, by seed.
        edge: whether the chosen learning rate is the lowest or highest of those tried.
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
        return abs(self.value) > self.noise  # False for nan, too


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
                edge=len(tried) > 1 and rate in (min(tried), max(tried)),
                values={row["seed"]: row["validation" if row["test"] is None else "test"] for row in runs},
                rows=chosen["rows"],
                trainable=chosen["trainable"],
                total=chosen["total"],
                adapter_bytes=chosen["adapter_bytes"],
                peak_memory_bytes=max(row["peak_memory_bytes"] for row in runs),
                seconds_per_step=statistics.median(row["seconds_per_step"] for row in runs),
                curve=[
                    [statistics.fmean(values) for values in zip(*points, strict=True)]
                    for points in zip(*(row["curve"] for row in runs), strict=True)
                ],
            )
        )
    full = next((one for one in found if one.method == _FULL), None)
    reached = [Summary(**{**vars(one), "reached": _reached(one, full, plan.reach)}) for one in found]
    return sorted(reached, key=lambda one: one.mean, reverse=bool(found) and found[0].mode == "max")


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
        factor = _T.get(len(paired) - 1, _NORMAL)
        noise.append(factor * statistics.stdev(paired) / math.sqrt(len(paired)))
    if one.metric.endswith("accuracy"):
        noise.append(_NORMAL * math.sqrt(sum(x.mean * (1 - x.mean) for x in (one, other)) / one.rows))
    return Difference(statistics.fmean(paired), max(noise, default=math.nan))


def verdict(found: Sequence[Summary]) -> list[str]:
    """Say what the numbers show, and what they do not, one sentence or two for each point."""
    if not found:
        return ["No method finished."]
    by_name = {one.method: one for one in found}
    methods = [one for one in found if one.method not in (_FULL, _HEAD)]
    said = []
    if len(methods) > 1:
        first, rest = methods[0], methods[1:]
        alike = [one for one in rest if not difference(first, one).real]
        if alike:
            names = ", ".join(one.method for one in alike)
            said.append(f"{first.method} has the best {first.metric}, but the differences to {names} are within noise.")
            least = min([first, *alike], key=lambda one: one.trainable)
            if least is not first:
                said.append(f"Of those, {least.method} trains the fewest parameters: {least.share:.2f} %.")
        else:
            said.append(
                f"{first.method} has the best {first.metric}, and the difference to every other is above noise."
            )
    for name, what in ((_FULL, "full fine-tuning"), (_HEAD, "training the head alone")):
        if name in by_name and methods:
            parts = []
            for one in methods:
                gap = difference(one, by_name[name])
                sign = "within noise" if not gap.real else "above noise"
                parts.append(f"{one.method} {gap.value:+.3f} ({sign})")
            said.append(f"Against {what}: {'; '.join(parts)}.")
    if all(len(one.values) < 2 for one in found):
        known = found[0].metric.endswith("accuracy")
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
    "adapter": lambda one: f"{one.adapter_bytes:,} B",
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
    return [
        f"Base {plan.base}, task {plan.task}; {plan.steps} steps for every run, the metric is that of the last step; "
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


# ------------------------------------------------------------------------------------------------- plots


def plots(plan: Plan, found: Sequence[Summary]) -> dict[str, Any]:
    """Return matplotlib figures by name; none where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    metric = found[0].metric
    colors = {method: f"C{at}" for at, method in enumerate(plan.methods)}

    def scatter(value: Callable[[Summary], float], label: str, log: bool) -> Any:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for one in found:
            error = one.std if len(one.values) > 1 else None
            axes.errorbar(value(one), one.mean, yerr=error, fmt="o", color=colors[one.method], capsize=3)
            axes.annotate(one.method, (value(one), one.mean), xytext=(5, 4), textcoords="offset points", fontsize=8)
        if log:
            axes.set_xscale("log")
        axes.margins(x=0.18, y=0.1)
        axes.set(xlabel=label, ylabel=metric)
        axes.grid(alpha=0.25)
        return figure

    curves = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = curves.subplots()
    for one in found:
        steps, _, values = zip(*one.curve, strict=True)
        axes.plot(steps, values, marker="o", markersize=3, label=one.method, color=colors[one.method])
    axes.set(xlabel="step", ylabel="val_" + metric.partition("_")[2])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, ncols=2, framealpha=0)
    return {
        "quality_by_parameters": scatter(lambda one: one.trainable, "trained parameters", True),
        "quality_by_memory": scatter(lambda one: one.peak_memory_bytes / 2**20, "peak memory (MiB)", False),
        "learning_curves": curves,
    }


def _inked(figure: Any) -> None:
    """Give everything that is not a method's the stand-in of the page's text color, on no background."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=_INK)
        legend = axes.get_legend()
        texts = [axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else [])]
        for text in texts:
            text.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)


def inline_svg(figure: Any, name: str) -> str:
    """A figure as an SVG element for an HTML page: text stays text, and takes the page's color."""
    import matplotlib

    _inked(figure)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Ids are the page's: those of two plots must differ.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = name.replace("_", " ")
    return text.replace(_INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --soft: #60666d; --line: #dfe3e7; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e9ec; --soft: #9aa2aa; --line: #30363c; --card: #1c2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.verdict { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1.2rem; }
.verdict ul { margin: 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .6rem; padding: .6rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .88rem; padding: .2rem .3rem; }
p { color: var(--soft); font-size: .9rem; }
"""


def page(plan: Plan, found: Sequence[Summary], rows: Sequence[dict[str, Any]], figures: dict[str, Any]) -> str:
    """The report as one HTML file that needs nothing else."""
    head, *body = ([html.escape(text) for text in line] for line in table(plan, found))
    cells = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>\n" for line in body)
    said = "".join(f"<li>{html.escape(point)}</li>" for point in verdict(found))
    drawn = "".join(
        f"<figure>{inline_svg(figure, name)}<figcaption>{name.replace('_', ' ').capitalize()}</figcaption></figure>\n"
        for name, figure in figures.items()
    )
    notes = "".join(f"<p>{html.escape(text)}</p>\n" for text in setting(plan, rows))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison of methods</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>Comparison of methods</h1>\n<div class="verdict"><ul>{said}</ul></div>\n'
        f'<h2>Results</h2>\n<div class="scroll"><table><thead><tr>{"".join(f"<th>{text}</th>" for text in head)}</tr>'
        f"</thead><tbody>\n{cells}</tbody></table></div>\n"
        + (f'<h2>Plots</h2>\n<div class="plots">\n{drawn}</div>\n' if drawn else "")
        + f"<h2>What was run</h2>\n{notes}</body>\n</html>\n"
    )


def write_report(folder: Path, plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write `report.md`, `report.html` and the plots; return the files' names."""
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
