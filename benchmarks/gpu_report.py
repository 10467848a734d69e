"""The results of benchmarks/gpu.py as tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
COLUMNS = {
    "ms": ("ms", ".1f"),
    "host_ms": ("host ms", ".1f"),
    "activations_gb": ("activations GB", ".3g"),
    "launches": ("launches", ",.0f"),
    "first_s": ("first step s", ".1f"),
    "tokens_s": ("tokens/s", ",.0f"),
    "loss": ("loss", ".4f"),
    "third_loss": ("third loss", ".4f"),
}
# What was aimed at: a row's value by that of another row, or by itself, and the limit; "≥" above it.
GOALS: list[tuple[str, str, str | None, str]] = [
    ("lit_peft", "ms", "Unsloth", "≤ 0.90"),
    ("lit_peft", "ms", "peft", "≤ 0.62"),
    ("lit_peft", "ms", "peft, autocast", "≤ 0.53"),
    ("lit_peft, fp8", "ms", "lit_peft", "≤ 0.85"),
    ("lit_peft", "activations_gb", "Unsloth", "≤ 1.00"),
    ("lit_peft, checkpointed", "activations_gb", "Unsloth, checkpointed", "≤ 1.00"),
    ("lit_peft, short rows", "ms", None, "≤ 70"),
    ("lit_peft, DoRA", "ms", "lit_peft", "≤ 1.15"),
    ("lit_peft, dropout", "ms", "lit_peft", "≤ 1.05"),
    ("lit_peft, nf4", "ms", "lit_peft", "≤ 1.15"),
    ("lit_peft, packed rows", "ms", "lit_peft", "≤ 1.05"),
    *((method, "ms", "floor", "≤ 1.05") for method in ("Prompt Tuning", "Prefix Tuning", "AdapterH", "AdapterP")),
    ("decoding, LoRA", "tokens_s", "decoding, base", "≥ 0.85"),
    ("decoding, LoRA merged meanwhile", "tokens_s", "decoding, base", "≥ 0.85"),
    ("fit", "ms", "bare loop", "≤ 1.03"),
    ("fit", "first_s", None, "≤ 40"),
]


def line(name: str, row: dict[str, Any]) -> str:
    """A row as it is printed when it is done."""
    if "skipped" in row:
        return f"{name}: {row['skipped']}"
    return f"{name}: " + ", ".join(f"{row[key]:{form}} {title}" for key, (title, form) in COLUMNS.items() if key in row)


def table(results: Results) -> str:
    """All rows as a Markdown table."""
    rows = results["rows"]
    used = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = ["| | " + " | ".join(COLUMNS[key][0] for key in used) + " |", "|---|" + "---:|" * len(used)]
    for name, row in rows.items():
        if "skipped" in row:
            cells = [f"not measured: {row['skipped']}".replace("|", "/"), *[""] * (len(used) - 1)]
        else:
            cells = [f"{row[key]:{COLUMNS[key][1]}}" if key in row else "" for key in used]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goals(results: Results) -> str:
    """What was aimed at and what is reached, as a Markdown table."""
    rows, lines = results["rows"], ["| | measured | goal |", "|---|---:|---:|"]
    for name, key, other, aim in GOALS:
        value, base = rows.get(name, {}).get(key), 1.0 if other is None else rows.get(other, {}).get(key)
        if value is None or not base:
            continue
        found, limit = value / base, float(aim[2:])
        missed = found < limit if aim.startswith("≥") else found > limit
        what = f"{name}: {COLUMNS[key][0]}" + ("" if other is None else f", by that of {other}")
        lines.append(f"| {what} | {found:.3g}{' (missed)' if missed else ''} | {aim} |")
    return "\n".join(lines)


def differences(results: Results, names: Sequence[str]) -> str:
    """How far the losses of rows that compute the same are apart, in a sentence."""
    found = {name: results["rows"][name] for name in names if "loss" in results["rows"].get(name, {})}
    if len(found) < 2:
        return "There are no two rows whose losses could be compared."
    parts = []
    for key, what in (("loss", "first"), ("third_loss", "third")):
        losses = [row[key] for row in found.values()]
        parts.append(f"{(max(losses) - min(losses)) / max(losses):.1e} at the {what} step")
    return f"The losses of {', '.join(found)} differ by at most {' and '.join(parts)}, by the largest."


def page(results: Results, same_loss: Sequence[str]) -> str:
    """The whole report."""
    head = (
        f"{results['device']}, {results['date']}, torch {results['torch']}: Llama of {results['shape']}, "
        f"{results['tokens']:,} tokens a step, median of {results['rounds']} steps."
    )
    return "\n\n".join([head, goals(results), table(results), differences(results, same_loss)])


def plot(results: Results, file: Path) -> None:
    """Draw the time and the memory of every row that takes steps."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lit-peft"  # the same file from the same results
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in results["rows"].items() if "ms" in row}
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.3 * len(rows) + 1.5), squeeze=False)
    for axis, key, title in zip(axes[0], ("ms", "activations_gb"), ("ms a step", "activations, GB"), strict=True):
        colors = ["tab:blue" if name.startswith("lit_peft") else "tab:gray" for name in rows]
        axis.barh(range(len(rows)), [row.get(key, 0.0) for row in rows.values()], color=colors)
        axis.set_yticks(range(len(rows)))
        axis.set_yticklabels(rows if axis is axes[0][0] else [], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
    figure.suptitle(f"{results['device']}, Llama of {results['shape']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
