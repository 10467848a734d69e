"""Hold the reference outputs of LLM-Adapters against their gold answers: the rows that differ, with the reason.

    python benchmarks/reference_answers.py FOLDER --write docs/reasoning.md

FOLDER holds the benchmark's JSON files. The listing stands in the page between its two marks; without `--write`, it is
printed.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from lit_peft.tasks.answers import TOLERANCE, extract_answer, gold_text, kind_of, same_answer

START, END = "<!-- listing: start -->", "<!-- listing: end -->"
# Reasons, in the order they are tried.
REASONS = {
    "empty": "the output is empty",
    "open": "breaks off: no answer is stated",
    "letter": "states another letter",
    "wordless": "states no number",
    "part": "states another number, the gold one as a part of it",
    "several": "states several quantities, none of them the gold one",
    "sign": "states the gold number with the other sign",
    "close": "states a number within 1 % of the gold one: a slip, or rounded",
    "power": "states the gold number times a power of ten",
    "step": "states another number; the gold one stands in the working before it",
    "other": "states another number; the gold one stands nowhere",
}


def reason(output: str, answer: str | None, gold: str, kind: str) -> str:
    """Say why a reference output's answer is not the gold one; a key of `REASONS`.

    By plain rules of its own: what the output states is what stands after its last "answer is".
    """
    working, stated, said = output.rpartition("nswer is")
    if not output.strip():
        return "empty"
    if not stated:
        return "open"
    if kind == "letter":
        return "letter"
    wanted = float(gold.replace(",", ""))

    def numbers(text: str) -> list[float]:
        return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]

    def among(text: str) -> bool:
        return any(abs(number - wanted) <= TOLERANCE for number in numbers(text))

    if not numbers(said) or answer is None:
        return "wordless"
    if among(said):
        return "part"
    if len(re.split(r"\band\b|\bor\b", said)) > 1 and len(numbers(said)) > 1:
        return "several"
    value = float(answer)
    if abs(value + wanted) <= TOLERANCE:
        return "sign"
    if wanted and abs(value - wanted) <= 0.01 * abs(wanted):
        return "close"
    if any(abs(value * factor - wanted) <= TOLERANCE for factor in (0.001, 0.01, 0.1, 10, 100, 1000)):
        return "power"
    return "step" if among(working) else "other"


def differing(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, str | None, str]]]:
    """Return, by reason, the rows whose output does not give gold: number (from 1), extracted answer, gold answer."""
    found: dict[str, list[tuple[int, str | None, str]]] = defaultdict(list)
    for number, row in enumerate(rows, start=1):
        kind, gold = kind_of(row["answer"]), gold_text(row["answer"])
        if kind is None:
            raise SystemExit(f"row {number}: {row['answer']!r} is no answer of any benchmark")
        answer = extract_answer(row["output"], kind)
        if not same_answer(answer, gold, kind):
            found[reason(row["output"], answer, gold, kind)].append((number, answer, gold))
    return found


def listing(folder: Path) -> str:
    """Return the table of all files, and under it each file's rows by reason, as Markdown."""
    table = ["| file | rows | output gives gold | differ |", "|---|---|---|---|"]
    parts = []
    for file in sorted(folder.glob("*.json")):
        rows = json.loads(file.read_text("utf-8"))
        if "output" not in rows[0]:
            continue
        found = differing(rows)
        count = sum(map(len, found.values()))
        table.append(f"| {file.stem} | {len(rows):,} | {len(rows) - count:,} | {count:,} |")
        parts += [f"### {file.stem}"] if found else []
        for key in (key for key in REASONS if key in found):
            number, answer, gold = found[key][0]
            first = f"row {number} gives {answer or 'nothing'}, gold is {gold}"
            numbers = ", ".join(str(row[0]) for row in found[key])
            parts.append(f"**{REASONS[key]}**: {len(found[key]):,} (such as {first}). Rows:")
            parts.append("\n".join(textwrap.wrap(numbers, 116)))
    return "\n\n".join(["\n".join(table), *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, help="page whose listing is replaced")
    arguments = parser.parse_args()
    text = listing(arguments.folder)
    if arguments.write is None:
        print(text)
        return
    page = arguments.write.read_text("utf-8")
    before, after = page.partition(START)[0], page.partition(END)[2]
    arguments.write.write_text(f"{before}{START}\n{text}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
