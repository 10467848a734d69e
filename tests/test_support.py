"""Which method trains on which architecture: what ran here is what the README's table says.

`LIT_PEFT_WRITE_SUPPORT=1 python -m pytest tests/test_support.py` writes the table anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from models import ALL, DECODERS, ENCODERS, batch, make

import lit_peft
import lit_peft.modules
from lit_peft.training.module import BaseLM

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- support: start -->\n", "<!-- support: end -->\n"
METHODS = {
    name: kind
    for name, kind in vars(lit_peft.modules).items()
    if isinstance(kind, type) and issubclass(kind, BaseLM) and kind is not BaseLM
    if name not in ("FullFineTuning", "HeadOnly")
}


def trains(method: str, architecture: str) -> str:
    """Take two steps with the method's default settings; "yes", or the error that says why not."""
    model, inputs = make(architecture), batch(architecture)
    torch.manual_seed(0)
    try:
        lit_peft.attach(model, METHODS[method].settings_class())
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


@pytest.fixture(scope="module")
def table() -> str:
    notes: dict[str, int] = {}
    rows = [
        "| | " + " | ".join(f"`{method}`" for method in METHODS) + " |",
        "|---|" + "---|" * len(METHODS),
    ]
    for architecture in ALL:
        cells = []
        for method in METHODS:
            said = trains(method, architecture)
            cells.append("yes" if said == "yes" else f"no ({notes.setdefault(said, len(notes) + 1)})")
        kind = "decoder" if architecture in DECODERS else "encoder" if architecture in ENCODERS else "encoder-decoder"
        rows.append(f"| {architecture} ({kind}) | " + " | ".join(cells) + " |")
    return "\n".join([*rows, *(f"\n({number}) {note}" for note, number in notes.items())]) + "\n"


def test_the_support_table_is_what_ran(table: str) -> None:
    text = README.read_text(encoding="utf-8")
    before, middle, after = text.partition(START)
    assert middle, "README.md has no support table"
    if os.environ.get("LIT_PEFT_WRITE_SUPPORT"):
        README.write_text(before + START + table + END + after.partition(END)[2], encoding="utf-8")
        return
    assert after.partition(END)[0] == table, "write the table anew: see this file's head"
