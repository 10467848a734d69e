"""Puts the results into the documentation: `python benchmarks/page.py` rewrites tables and plots of docs/speed.md.

Reads benchmarks/results/*.json, which the other scripts write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = {
    "gflop": "GFLOP",
    "saved_mb": "saved MB",
    "peak_mb": "peak MB",
    "ms": "ms",
    "ratio": "× peft's time",
    "cpu_ratio": "… CPU time",
    "of_floor": "× the floor's",
    "cpu_of_floor": "… CPU time",
}
Results = list[dict[str, Any]]


def step_table(results: Results) -> str:
    """The results of step.py as a Markdown table."""
    used = [key for key in COLUMNS if any(key in values for each in results for values in each["ways"].values())]
    rows = [["case", "run", *(COLUMNS[key] for key in used)]]
    for each in results:
        for way, values in each["ways"].items():
            of_peft = "peft" in each["ways"]
            cells = [_cell(key, values, of_peft) for key in used]
            rows.append([each["case"], way, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|" + "---:|" * len(used), *lines[1:]])


def _cell(key: str, values: dict[str, float], of_peft: bool) -> str:
    if key not in values or (key in ("ratio", "cpu_ratio") and not of_peft):
        return ""
    return f"{values[key]:.2f}" if key.endswith(("ratio", "of_floor")) else f"{values[key]:.1f}"


def step_plot(results: Results, file: Path) -> None:
    """Draw every quantity relative to peft's, where peft has the method."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lit-peft"  # the same file from the same results
    import matplotlib.pyplot as plt

    titles = {
        "gflop": "products",
        "saved_mb": "bytes saved for backward",
        "peak_mb": "peak memory",
        "cpu_ratio": "time of a step",
    }
    results = [each for each in results if "peft" in each["ways"]]
    used = [key for key in titles if any(key in each["ways"]["peft"] for each in results)]
    figure, axes = plt.subplots(1, len(used), figsize=(3.4 * len(used), 0.45 * len(results) + 1.5), squeeze=False)
    ways = ["lit_peft", "lit_peft, cached", "floor", "full fine-tuning"]
    for axis, key in zip(axes[0], used, strict=True):
        for at, way in enumerate(ways):
            shown = [
                (row + 0.2 * at, each["ways"][way][key] / each["ways"]["peft"][key])
                for row, each in enumerate(results)
                if key in each["ways"].get(way, {})
            ]
            axis.barh([row for row, _ in shown], [value for _, value in shown], 0.2, label=way)
        axis.set_yticks([row + 0.3 for row in range(len(results))])
        axis.set_yticklabels([each["case"] for each in results] if axis is axes[0][0] else [], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{titles[key]}, peft = 1", fontsize=9)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def targets(results: Results) -> str:
    """What was aimed at, and what is reached, as a Markdown table."""
    by_case = {each["case"]: each for each in results}

    def of(case: str, key: str, way: str = "peft") -> float | None:
        ways = by_case.get(case, {"ways": {}})["ways"]
        if way not in ways or key not in ways["lit_peft"]:
            return None
        return ways["lit_peft"][key] / ways[way][key]

    def own(case: str, key: str) -> float | None:
        return by_case.get(case, {"ways": {}})["ways"].get("lit_peft", {}).get(key)

    rows: list[tuple[str, float | None, float]] = []
    if "V=32k" in by_case:
        each = by_case["V=32k"]
        shape, ways = each["shape"], each["ways"]
        adapters = 6 * each["trained"] * shape["rows"] * shape["length"] / 1e9
        least = ways["floor"]["gflop"] + adapters
        rows.append(("V=32k: products, of the floor's and the adapters'", ways["lit_peft"]["gflop"] / least, 1.02))
    for case, key, what, limit in [
        ("V=32k", "cpu_ratio", "step time, of peft's", 0.72),
        ("V=128k", "cpu_ratio", "step time, of peft's", 0.60),
        ("V=64k, half the width", "cpu_ratio", "step time, of peft's", 0.60),
        ("V=32k", "cpu_of_floor", "step time, of the floor's", 1.15),
        ("V=32k, all tokens supervised", "cpu_ratio", "step time, of peft's", 0.97),
    ]:
        rows.append((f"{case}: {what}", own(case, key), limit))
    for case, key, what, limit in [
        ("V=32k, all tokens supervised", "saved_mb", "saved bytes, of peft's", 0.70),
        ("V=32k", "saved_mb", "saved bytes, of peft's", 0.70),
        ("V=32k, bf16", "saved_mb", "saved bytes, of peft's", 0.45),
        ("V=32k, dropout 0.05", "saved_mb", "saved bytes, of peft's", 0.50),
        ("V=32k", "peak_mb", "peak memory, of peft's", 0.65),
        ("V=128k", "peak_mb", "peak memory, of peft's", 0.50),
        ("V=64k, half the width", "peak_mb", "peak memory, of peft's", 0.50),
        ("V=32k, all tokens supervised", "peak_mb", "peak memory, of peft's", 0.70),
        ("V=32k, top quarter", "gflop", "products, of peft's", 0.76),
    ]:
        rows.append((f"{case}: {what}", of(case, key), limit))
    cached = by_case.get("V=32k, top quarter", {"ways": {}})["ways"]
    if "lit_peft, cached" in cached:
        share = cached["lit_peft, cached"]["gflop"] / cached["peft"]["gflop"]
        rows.append(("V=32k, top quarter, states kept: products, of peft's", share, 0.35))
    for case, each in by_case.items():
        if "matmuls" in each["ways"]:
            rows.append((f"{case}: step time, of the floor's and its products'", own(case, "cpu_ratio"), 1.02))
        elif "full fine-tuning" not in each["ways"]:
            rows.append((f"{case}: step time, of peft's", own(case, "cpu_ratio"), 0.80))
    lines = ["| | measured | goal |", "|---|---:|---:|"]
    for what, value, limit in rows:
        if value is not None:
            lines.append(f"| {what} | {value:.3f}{'' if value <= limit else ' (missed)'} | ≤ {limit:.2f} |")
    return "\n".join(lines)


# Each figure of overheads.py: what it is, and what was aimed at (a number below which, or after "≥" above which).
FIGURES = {
    "injection_ms": ("`attach`, LoRA on the 56 linear layers of the shape above, ms", "≤ 20"),
    "injection_7b_meta_ms": ("`attach`, LoRA on all linear layers of a 7B on meta, ms", "≤ 1000"),
    "import_ms": ("`import lit_peft` after `import torch`, ms", "≤ 50"),
    "trainer_adds_ms": ("what Trainer and LightningModule add to a step, ms", ""),
    "trainer_ratio": ("that step, batch 4 × 256, by a bare loop's", "≤ 1.03"),
    "graph_breaks": ("graph breaks of `torch.compile` with LoRA", "≤ 0"),
    "graph_breaks_of_base": ("those of the base", ""),
    "compiled_ratio": ("compiled training step by the eager one (2 layers)", ""),
    "decode_qv_ratio": ("decoding speed by the base's, LoRA r=8 on query and value, not merged", "≥ 0.93"),
    "decode_all_ratio": ("the same, r=16 on all linear layers", "≥ 0.93"),
}


def overheads_table(figures: dict[str, float]) -> str:
    """The results of overheads.py as a Markdown table."""
    lines = ["| | measured | goal |", "|---|---:|---:|"]
    for key, (what, aim) in FIGURES.items():
        if key in figures:
            value, limit = figures[key], float(aim[2:] or "inf")
            missed = value < limit if aim.startswith("≥") else value > limit
            lines.append(f"| {what} | {value:.3g}{' (missed)' if missed else ''} | {aim} |")
    return "\n".join(lines)


def sections() -> dict[str, str]:
    """What belongs between the markers of docs/speed.md, by name."""
    results = json.loads((RESULTS / "step.json").read_text())["results"]
    return {
        "targets": targets(results),
        "step": step_table(results),
        "overheads": overheads_table(json.loads((RESULTS / "overheads.json").read_text())),
        "scaling": (RESULTS / "scaling.md").read_text(encoding="utf-8").strip(),
    }


def filled(text: str) -> str:
    """The page with its sections as the results have them."""
    for name, content in sections().items():
        marks = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        text = pattern.sub(lambda _: f"{marks[0]}\n{content}\n{marks[1]}", text)  # noqa: B023
    return text


def main() -> None:
    """Rewrite the page and its plot."""
    page = DOCS / "speed.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    step_plot(json.loads((RESULTS / "step.json").read_text())["results"], DOCS / "speed.png")


if __name__ == "__main__":
    main()
