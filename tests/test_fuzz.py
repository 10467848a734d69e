"""A few of the cases of `tests/fuzz.py`, on every kind of file."""

from __future__ import annotations

import pytest
from fuzz import fuzz


@pytest.mark.parametrize(("kind", "count"), [("adapters", 200), ("checkpoints", 200), ("configs", 60), ("data", 60)])
def test_mutated_files(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", "")  # restored afterwards
    tally, faults = fuzz(kind, count)
    assert not faults, "\n".join(faults)
    # Mutations break files, though not all of them.
    assert tally["read"] and tally["refused"] >= count // 3
