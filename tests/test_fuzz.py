"""A few of the cases of `tools/fuzz.py`, on every kind of file."""

from __future__ import annotations

import pytest
from fuzz import fuzz

LIGHT = [("adapters", 40), ("checkpoints", 40), ("configs", 60), ("data", 20)]
FULL = [("adapters", 400), ("checkpoints", 400), ("configs", 200), ("data", 100)]


@pytest.mark.parametrize(("kind", "count"), [*LIGHT, *(pytest.param(*case, marks=pytest.mark.heavy) for case in FULL)])
def test_mutated_files(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", "")  # restored afterwards
    tally, faults = fuzz(kind, count)
    assert not faults, "\n".join(faults)
    # Mutations break files, though not all of them; of configurations, one in twenty is left.
    assert tally["refused"] >= count // 3 and (tally["read"] or kind == "configs")
