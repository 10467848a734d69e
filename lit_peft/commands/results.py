"""The results of `lit-peft compare`: a file with one line of JSON per finished run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_peft.commands.plan import Plan, make_cell, search_cells
from lit_peft.util.errors import LitPeftError

RESULTS = "results.jsonl"


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Read the finished runs of a file by their key. An incomplete last line is ignored.

    Raises:
        LitPeftError: another line is not a result.
    """
    content = file.read_bytes() if file.is_file() else b""
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].decode().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = row
        except (ValueError, KeyError, TypeError) as problem:
            raise LitPeftError(f"{file}, line {number} is not a result of lit-peft compare: remove it.") from problem
    return rows


class Results:
    """The finished runs, each appended to the file as one line.

    Args:
        file: the file; an incomplete last line, left by a killed process, is removed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = read_results(file)
        content = file.read_bytes() if file.is_file() else b""
        complete = content.rfind(b"\n") + 1
        if complete != len(content):
            os.truncate(file, complete)

    def add(self, row: dict[str, Any]) -> None:
        """Append a run and flush it to the disk."""
        with self.file.open("ab") as handle:
            handle.write((json.dumps(row) + "\n").encode())
            handle.flush()
            os.fsync(handle.fileno())
        self.rows[row["cell"]] = row


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the run with the best validation metric; None if all failed."""
    scored = [row for row in rows if "error" not in row and row["validation"] == row["validation"]]
    if not scored:
        return None
    return max(scored, key=lambda row: row["validation"] if row["mode"] == "max" else -row["validation"])


def newest_data(rows: Mapping[str, dict[str, Any]]) -> str:
    """Return the hash of the data of the latest run; an empty string for the runs of earlier versions, and for none."""
    return str(list(rows.values())[-1].get("data_hash", "")) if rows else ""


def left_out(plan: Plan, rows: Mapping[str, dict[str, Any]]) -> str:
    """Return a sentence on the finished runs that are not compared, because they had other data; "" if none had."""
    unknown = sum("data_hash" not in row for row in rows.values()) if plan.data_hash else 0
    other = sum(row.get("data_hash", plan.data_hash) != plan.data_hash for row in rows.values())
    parts = [f"{other} on other data"] if other else []
    parts += [f"{unknown} of an earlier version, which does not say on what data"] if unknown else []
    return f"Left out, and kept in {RESULTS}: {' and '.join(parts)}." if parts else ""


def finished_rows(plan: Plan, rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of the given runs (by their key) that belong to the plan and did not fail."""
    found = []
    for method in plan.methods:
        cells = search_cells(plan, method)
        chosen = best_row([rows[cell.key] for cell in cells if cell.key in rows])
        if chosen is not None:
            cells += [make_cell(plan, method, chosen["learning_rate"], seed) for seed in range(1, plan.seeds)]
        found += [rows[cell.key] for cell in cells if "error" not in rows.get(cell.key, {"error": ""})]
    return found
