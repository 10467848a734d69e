"""The report of `lit-peft compare`: `report.md`, `report.html` and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_peft.commands.figures import plots
from lit_peft.commands.page import page
from lit_peft.commands.plan import Plan
from lit_peft.commands.report_text import markdown
from lit_peft.commands.summary import summarize


def write_report(folder: Path, plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write `report.md`, `report.html` and the plots into a folder; return the names of the files."""
    found = summarize(plan, rows)
    (folder / "report.md").write_text(markdown(plan, found, rows), encoding="utf-8")
    figures = plots(plan, found) if found else {}
    names = ["report.md", "report.html"]
    if found and not figures:
        print("no plots: matplotlib is not installed (pip install 'lit-peft[plots]')")
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=150)
            names.append(f"{name}.{suffix}")
    (folder / "report.html").write_text(page(plan, found, rows, figures), encoding="utf-8")
    return names
