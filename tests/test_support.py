"""Which method trains on which architecture: the table in docs/support.md is what ran here.

`LIT_PEFT_WRITE_SUPPORT=1 python -m pytest -m heavy tests/test_support.py` writes the table anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from models import ALL, DECODERS, ENCODERS, batch, make

import lit_peft
from lit_peft.methods import registry

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
START, END = "<!-- support: start -->\n", "<!-- support: end -->\n"
METHODS = [name for name, method in registry.METHODS.items() if not method.baseline]


def trains(method: str, architecture: str) -> str:
    """Take two steps with the method's default settings; "yes", or the error that says why not."""
    model, inputs = make(architecture), batch(architecture)
    torch.manual_seed(0)
    try:
        lit_peft.attach(model, registry.settings_class(method)())
    except lit_peft.LitPeftError as problem:
        return str(problem)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [(parameter, parameter.clone()) for parameter in model.parameters() if not parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(1)
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0], (method, architecture, losses)
    assert all(torch.equal(parameter, before) for parameter, before in frozen)
    return "yes"


def row(architecture: str, notes: dict[str, int]) -> str:
    """The table's row of one architecture; reasons against a method are numbered in `notes`."""
    cells = []
    for method in METHODS:
        answer = trains(method, architecture)
        cells.append("yes" if answer == "yes" else f"no ({notes.setdefault(answer, len(notes) + 1)})")
    family = "decoder" if architecture in DECODERS else "encoder" if architecture in ENCODERS else "encoder-decoder"
    return f"| {architecture} ({family}) | " + " | ".join(cells) + " |"


def written() -> tuple[str, str, str]:
    """The page before its table, the table, and the page after it."""
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(START)
    table, end, after = rest.partition(END)
    assert start and end, "docs/support.md has no support table"
    return before + start, table, end + after


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_a_row_of_the_support_table_is_what_ran(architecture: str) -> None:
    assert row(architecture, {}) in written()[1].splitlines()


@pytest.mark.heavy
def test_the_support_table_is_what_ran() -> None:
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(f"`{method}`" for method in METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    lines += [row(architecture, notes) for architecture in ALL]
    table = "\n".join([*lines, *(f"\n({number}) {note}" for note, number in notes.items())]) + "\n"
    before, stored, after = written()
    if os.environ.get("LIT_PEFT_WRITE_SUPPORT"):
        PAGE.write_text(before + table + after, encoding="utf-8")
    else:
        assert stored == table, "write the table anew: see the top of this file"
