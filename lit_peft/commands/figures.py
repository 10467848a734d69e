"""The plots of `lit-peft compare`: matplotlib figures, and SVG elements for an HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from lit_peft.commands.plan import Plan
from lit_peft.commands.summary import FULL, HEAD, Summary

# A placeholder that `inline_svg` replaces by the text color of the page.
INK = "#010203"
_BASELINES = {FULL: INK, HEAD: "#8a9199"}
# Distinct on light and dark backgrounds, and without a pair of red and green.
_COLORS = ("#2f7ed8", "#e08214", "#1fa187", "#b4579e", "#6f63c9", "#c8a415", "#d1495b", "#4bb3d4")
_SIZE, _FONT = (6.0, 4.4), 9.5
# Offsets of a label from its point, in typographic points: right, left, above, below, and farther away.
_OFFSETS = [(7, -3), (-7, -3), (0, 8), (0, -15), *((dx, dy) for dy in (10, -16, 21, -27, 32, -38) for dx in (7, -7))]


def color(plan: Plan, method: str) -> str:
    """Return the color of a method, which is the same in every plot and in the page."""
    others = [name for name in plan.methods if name not in _BASELINES]
    return _BASELINES.get(method) or _COLORS[others.index(method) % len(_COLORS)]


def plots(plan: Plan, found: Sequence[Summary]) -> dict[str, Any]:
    """Return matplotlib figures by name; none if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    metric = found[0].metric

    def axes_of(figure: Any, label: str, metric: str) -> Any:
        axes = figure.subplots()
        axes.set_xlabel(label, fontsize=_FONT)
        axes.set_ylabel(metric, fontsize=_FONT)
        axes.tick_params(labelsize=_FONT - 1)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def scatter(value: Callable[[Summary], float], label: str, log: bool) -> Any:
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = axes_of(figure, label, metric)
        if log:
            axes.set_xscale("log")
        for one in found:
            error = one.std if len(one.values) > 1 else None
            axes.errorbar(
                value(one), one.mean, yerr=error, fmt="o", markersize=6, color=color(plan, one.method), capsize=3
            )
        axes.margins(x=0.22, y=0.14)
        _label(figure, axes, [(one.method, value(one), one.mean) for one in found])
        return figure

    def curves(column: int, label: str) -> Any:
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = axes_of(figure, label, "val_" + metric.partition("_")[2])
        for one in found:
            x, y = ([point[index] for point in one.curve] for index in (column, 2))
            dashes = "--" if one.method in _BASELINES else "-"
            ink = color(plan, one.method)
            axes.plot(x, y, dashes, marker="o", markersize=3.5, label=one.method, color=ink, lw=1.6)
        axes.legend(fontsize=_FONT - 1.5, ncols=2, framealpha=0, loc="best")
        return figure

    return {
        "quality_by_parameters": scatter(lambda one: one.trainable, "trained parameters", True),
        "quality_by_memory": scatter(lambda one: one.peak_memory_bytes / 2**20, "peak memory (MiB)", False),
        "learning_curves": curves(0, "step"),
        "learning_curves_by_time": curves(1, "seconds of training"),
    }


def _label(figure: Any, axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each name next to its point, at the first offset where it covers no point and no other name."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    spots = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in spots]
    left, right = axes.bbox.x0, axes.bbox.x1
    for (name, x, y), (px, py) in zip(points, spots, strict=True):
        width, height = 0.56 * _FONT * len(name) * scale, _FONT * scale

        def box(dx: float, dy: float, point: Any = (px, py), size: Any = (width, height)) -> Any:
            start = point[0] + dx * scale - size[0] * (0 if dx > 0 else 1 if dx < 0 else 0.5)
            return start, point[1] + dy * scale, start + size[0], point[1] + dy * scale + size[1]

        def free(one: Any) -> bool:
            inside = left <= one[0] and one[2] <= right
            return inside and not any(
                one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3] for other in taken
            )

        dx, dy = next((offset for offset in _OFFSETS if free(box(*offset))), _OFFSETS[0])
        taken.append(box(dx, dy))
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        axes.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=_FONT - 1, ha=side)


def _use_page_color(figure: Any) -> None:
    """Draw axes, text and legend in the placeholder color, on a transparent background."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=INK)
        legend = axes.get_legend()
        texts = [axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else [])]
        for text in texts:
            text.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(INK)


def inline_svg(figure: Any, name: str) -> str:
    """Return a figure as an SVG element for an HTML page: text stays text, in the color of the page."""
    import matplotlib

    _use_page_color(figure)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Ids must be unique within the page.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = name.replace("_", " ")
    return text.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
