"""The report of `lit-peft compare` as one self-contained HTML page, for large and small screens."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from lit_peft.commands.figures import INK, color, inline_svg
from lit_peft.commands.plan import Plan
from lit_peft.commands.report_text import notes, table, verdict
from lit_peft.commands.summary import FULL, HEAD, Summary, difference

_CAPTIONS = {
    "quality_by_parameters": "Quality against trained parameters",
    "quality_by_memory": "Quality against peak memory",
    "learning_curves": "Learning curves, by steps",
    "learning_curves_by_time": "Learning curves, by time",
}

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --soft: #5b626a; --line: #e1e5e9; --card: #f6f8fa;
  --good: #14734d; --good-back: #e2f4ea; --bad: #9c3414; --bad-back: #fbe9e2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e9ec; --soft: #9aa2aa; --line: #2c3238; --card: #1b2024;
    --good: #7fd6ac; --good-back: #17352a; --bad: #f0a78c; --bad-back: #3d241b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 74rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
.what { margin: .3rem 0 1.4rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); gap: .8rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.verdict { margin: 0; padding-left: 1.2rem; }
.verdict li { margin: .3rem 0; }
.bars { font-size: .92rem; font-variant-numeric: tabular-nums; }
.bars > div { display: grid; grid-template: "name track value tag" / 8.6rem 1fr 3.6rem 8.4rem; gap: 0 .8rem;
  align-items: center; }
.bars .value { text-align: right; }
.track { grid-area: track; position: relative; height: 1.7rem; border-bottom: 1px solid var(--line); }
.track i { position: absolute; top: 50%; }
.track .base { top: 0; bottom: -1px; width: 0; border-left: 1.5px dashed var(--soft); opacity: .7; }
.track .spread { height: 3px; margin-top: -1.5px; border-radius: 2px; opacity: .45; }
.track .dot { width: .8rem; height: .8rem; margin: -.4rem 0 0 -.4rem; border-radius: 50%; }
.tag { font-size: .78rem; border-radius: 1rem; padding: .08rem .6rem; white-space: nowrap; justify-self: start; }
.same { color: var(--good); background: var(--good-back); }
.less { color: var(--bad); background: var(--bad-back); }
.none { color: var(--soft); background: var(--card); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .7rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; line-height: 1.25; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .7rem; padding: .8rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; font-size: .92rem; padding: 0 .2rem .5rem; }
.notes p { color: var(--soft); font-size: .9rem; max-width: 60rem; margin: .5rem 0; }
@media (max-width: 40rem) {
  .bars > div { grid-template: "name value tag" "track track track" / 1fr max-content max-content; gap: 0 .6rem;
    padding-top: .35rem; }
  .track { height: 1.1rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
"""


def page(plan: Plan, found: Sequence[Summary], rows: Sequence[dict[str, Any]], figures: dict[str, Any]) -> str:
    """Return the report as one HTML page that loads no other file."""
    head, *body = ([html.escape(text) for text in line] for line in table(plan, found))
    cells = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>\n" for line in body)
    points = "".join(f"<li>{html.escape(point)}</li>\n" for point in verdict(found))
    drawn = "".join(
        f"<figure><figcaption>{_CAPTIONS[name]}</figcaption>{inline_svg(figure, name)}</figure>\n"
        for name, figure in figures.items()
    )
    run_notes = "".join(f"<p>{html.escape(text)}</p>\n" for text in notes(plan, rows))
    budget = f"{plan.steps} steps" if plan.seconds is None else f"{plan.seconds:g} s"
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds"
    subtitle = html.escape(f"{plan.base.removeprefix('pkg:')} · {plan.task.replace('_', ' ')} · {budget} · {seeds}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison of methods</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>Comparison of methods</h1>\n<p class="what">{subtitle}</p>\n{_tiles(found)}'
        + (f"<h2>{html.escape(found[0].metric.replace('_', ' '))}</h2>\n{_bars(plan, found)}" if found else "")
        + f'<h2>What this shows</h2>\n<ul class="verdict">{points}</ul>\n'
        f'<h2>Results</h2>\n<div class="scroll"><table><thead><tr>{"".join(f"<th>{text}</th>" for text in head)}</tr>'
        f"</thead><tbody>\n{cells}</tbody></table></div>\n"
        + (f'<h2>Plots</h2>\n<div class="plots">\n{drawn}</div>\n' if drawn else "")
        + f'<h2>What was run</h2>\n<div class="notes">{run_notes}</div>\n</body>\n</html>\n'
    )


def _tiles(found: Sequence[Summary]) -> str:
    """The three or four main figures."""
    named = {one.method: one for one in found}
    methods = [one for one in found if one.method not in (FULL, HEAD)]
    entries = [(f"{methods[0].mean:.4g}", f"{methods[0].method}, {methods[0].share:.2g} % trained")] if methods else []
    entries += [
        (f"{named[name].mean:.4g}", label)
        for name, label in ((FULL, "full fine-tuning"), (HEAD, "head alone"))
        if name in named
    ]
    gaps = [difference(one, named[FULL]) for one in methods] if FULL in named else []
    if gaps and all(gap.significant or gap.within_noise for gap in gaps):
        entries.append(
            (f"{sum(gap.within_noise for gap in gaps)} of {len(gaps)}", "methods within noise of full fine-tuning")
        )
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{html.escape(label)}</span></div>' for value, label in entries
    )
    return f'<div class="tiles">{tiles}</div>\n'


def _bars(plan: Plan, found: Sequence[Summary]) -> str:
    """The mean and standard deviation of each method on one scale, and its difference to the reference."""
    named = {one.method: one for one in found}
    reference = named.get(FULL, found[0])
    ends = [one.mean + sign * (one.std if len(one.values) > 1 else 0) for one in found for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def position(value: float) -> float:
        return 2 + 96 * (value - low) / span

    lines = []
    for one in found:
        std = one.std if len(one.values) > 1 else 0.0
        ink = color(plan, one.method).replace(INK, "var(--ink)")
        marks = "".join(f'<i class="base" style="left:{position(named[name].mean):.2f}%"></i>' for name in (FULL, HEAD)
                        if name in named)  # fmt: skip
        marks += (
            f'<i class="spread" style="left:{position(one.mean - std):.2f}%;width:{192 * std / span:.2f}%;'
            f'background:{ink}"></i><i class="dot" style="left:{position(one.mean):.2f}%;background:{ink}"></i>'
        )
        gap = difference(one, reference)
        kind, tag = "none", "reference"
        if one is not reference:
            better = gap.value > 0 if one.mode == "max" else gap.value < 0
            kind = "same" if gap.within_noise or (gap.significant and better) else "less" if gap.significant else "none"
            value = f"{gap.value:+.3f}" if gap.significant else f"{gap.value:+.3f}, noise unknown"
            tag = "within noise" if gap.within_noise else value
        lines.append(
            f'<div><span>{one.method}</span><span class="track">{marks}</span><span class="value">{one.mean:.4f}</span>'
            f'<span class="tag {kind}">{tag}</span></div>\n'
        )
    return f'<div class="bars">\n{"".join(lines)}</div>\n'
