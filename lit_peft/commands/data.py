"""`lit-peft data`: shows what a configuration makes of its data, before anything is trained."""

from __future__ import annotations

import argparse
import html
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lit_peft.commands.lightning_cli import CLI
from lit_peft.commands.lightning_cli import run as run_cli
from lit_peft.commands.options import Options, check_counts
from lit_peft.data.preview import Piece, SplitFacts, examples_of, facts_of, pieces
from lit_peft.util.disk import write_file
from lit_peft.util.errors import LitPeftError

_HELP = """\
Prints a few examples with what is learned marked, and of each split: the number of rows, lengths, what is cut or
dropped, duplicates, labels, and how full packed rows would be. Takes the settings of `lit-peft fit`; the model's
weights are not loaded.

  lit-peft data --config FILE
  lit-peft data --data InstructionData --data.train FILE --base BASE
"""
# How a terminal shows what is learned, and the marks of plain text.
_COLOR, _PLAIN = ("\033[30;42m", "\033[0m"), ("[[", "]]")
# Labels that are listed; the others are counted.
_MOST_LABELS = 20

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --soft: #5b626a; --line: #e1e5e9; --mark: #bfe8cf; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e9ec; --soft: #9aa2aa; --line: #2c3238; --mark: #1d5a3d; }
}
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
pre { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; }
sub { color: var(--soft); }
"""


class DataCLI(CLI):
    """Reads the settings of `fit`, and builds the data module only."""

    def instantiate_classes(self) -> None:
        """Build the data module from its settings."""
        given = self.config[self.subcommand].get("data")
        if given is None:
            raise LitPeftError("No data module is given: use --config FILE, or --data CLASS with its settings.")
        module, _, name = given.class_path.rpartition(".")
        self.datamodule = getattr(import_module(module), name)(**given.init_args.as_dict())
        # LightningCLI now calls `trainer.fit` or, as here, `fit` of its own.
        self.model, self.config_init = None, self.config
        self.trainer = self  # type: ignore[assignment]

    def fit(self, **_: Any) -> None:
        """Nothing is trained."""

    def after_fit(self) -> None:
        """There is no result."""


def run(arguments: list[str]) -> None:
    """Run `lit-peft data`.

    Raises:
        LitPeftError: the settings or the data are wrong.
    """
    parser = Options(prog="lit-peft data", description=_HELP, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", help="the base model, as --model.base")
    parser.add_argument("--examples", type=int, default=3, help="number of examples to show")
    parser.add_argument("--split", default="train", help="the split that they are from")
    parser.add_argument("--output", type=Path, help="write the report to this HTML file too")
    options, rest = parser.parse_known_args(arguments)
    check_counts(options, "examples")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = run_cli(["fit", *_with_model(rest, options.base)], DataCLI).datamodule
        found = [split for split in ("train", "validation", "test", "predict") if _has(data, split)]
        if options.split not in found:
            raise LitPeftError(f"--split {options.split} is not in the data: use one of {', '.join(found)}.")
        examples = {split: examples_of(data, split) for split in found if split != "predict" or options.split == split}
        facts = {split: facts_of(data, split, part) for split, part in examples.items()}
    lines = data.report()
    for warning in caught:
        if str(warning.message) not in lines:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    count = min(options.examples, len(examples[options.split]))
    shown = [pieces(data, examples[options.split][index]) for index in range(count)]
    report = _report(facts, lines)
    is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    _print(shown, options.split, report, _COLOR if is_colored else _PLAIN)
    if options.output is not None:
        write_file(options.output, _page(shown, options.split, report).encode())
        print(f"\nwritten to {options.output}")


def _with_model(arguments: Sequence[str], base: str | None) -> list[str]:
    """Return the arguments with a model, which `fit` needs; it is never built."""
    names = [text.partition("=")[0] for text in arguments]
    out = list(arguments)
    if base is None and "--model.base" not in names and "--data.base" in names:
        at = names.index("--data.base")
        base = arguments[at].partition("=")[2] or (arguments[at + 1] if at + 1 < len(arguments) else None)
    if "--config" not in names and "--model" not in names:
        out += ["--model", "LoRA"]
        base = base or ""
    return out if base is None else [*out, "--model.base", base]


def _has(data: Any, split: str) -> bool:
    return (data.streaming and split == "train") or split in data.rows


def _report(facts: dict[str, SplitFacts], lines: Sequence[str]) -> dict[str, list[str]]:
    """Return the figures of each split and what happened to the data, in lines under a title."""
    out = {f"{split}": _split_lines(part) for split, part in facts.items()}
    out["what happened to the data"] = list(lines) or ["Nothing was cut, dropped or ignored."]
    return out


def _split_lines(facts: SplitFacts) -> list[str]:
    if facts.rows is None:
        lines = [f"a stream; these are the figures of its first {facts.examples:,} examples"]
    else:
        lines = [f"{facts.rows:,} rows, {facts.examples:,} examples, {facts.duplicates:,} duplicates"]
    if not facts.examples:
        return lines
    learned = ""
    if facts.learned is not None:
        learned = f", {facts.learned:,} of them learned ({100 * facts.learned / max(facts.tokens, 1):.1f} %)"
    lines.append(f"{facts.tokens:,} tokens{learned}")
    names = {100: "longest"}
    lengths = ", ".join(f"{names.get(part, f'{part} % ≤')} {length:,}" for part, length in facts.lengths.items())
    lines.append(f"tokens of an example: {lengths} (max_length {facts.longest:,})")
    lines.append(f"padding in batches of {facts.batch_size:,}: {100 * facts.padding:.1f} %")
    if facts.packed is not None:
        rows, share = facts.packed
        count = "1 row" if rows == 1 else f"{rows:,} rows"
        lines.append(f"packed: {count} of {facts.longest:,} tokens, {100 * share:.1f} % full")
    if facts.labels:
        total = sum(facts.labels.values())
        shown = list(facts.labels.items())[:_MOST_LABELS]
        text = ", ".join(f"{name} {count:,} ({100 * count / max(total, 1):.1f} %)" for name, count in shown)
        more = len(facts.labels) - len(shown)
        lines.append(f"labels: {text}{f', and {more} more' if more else ''}")
    return lines


def _print(shown: Sequence[Sequence[Piece]], split: str, report: dict[str, list[str]], marks: tuple[str, str]) -> None:
    for number, example in enumerate(shown, start=1):
        print(f"--- example {number} of {split}")
        print("".join(_marked(piece, marks) for piece in example), end="\n\n")
    if shown:
        color = "in color" if marks == _COLOR else f"between {marks[0]} and {marks[1]}"
        print(f"What is learned is {color}.\n")
    for title, lines in report.items():
        print(f"{title}:\n" + "\n".join(f"  {line}" for line in lines))


def _marked(piece: Piece, marks: tuple[str, str]) -> str:
    text = "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in piece.text)
    text = f"{text}/{piece.note}" if piece.note else text
    return f"{marks[0]}{text}{marks[1]}" if piece.learned else text


def _page(shown: Sequence[Sequence[Piece]], split: str, report: dict[str, list[str]]) -> str:
    """Return the report as a self-contained HTML page."""
    parts = []
    for number, example in enumerate(shown, start=1):
        parts.append(f"<h2>Example {number} of {html.escape(split)}</h2>\n<pre>")
        parts += [_markup(piece) for piece in example]
        parts.append("</pre>\n")
    for title, lines in report.items():
        items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lines)
        parts.append(f"<h2>{html.escape(title[:1].upper() + title[1:])}</h2>\n<ul>\n{items}</ul>\n")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Data</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Data</h1>\n"
        f"<p>What is learned is <mark>marked</mark>.</p>\n{''.join(parts)}</body>\n</html>\n"
    )


def _markup(piece: Piece) -> str:
    text = html.escape(piece.text) + (f"<sub>{html.escape(piece.note)}</sub>" if piece.note else "")
    return f"<mark>{text}</mark>" if piece.learned else text
