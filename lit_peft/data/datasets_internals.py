"""The only private name of `datasets` that lit_peft uses; tests/test_internals_datasets.py checks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def get_fingerprint(table: Dataset) -> str:
    """Return the name under which `datasets` caches what is made from a table; "" for another map-style dataset.

    Why private: `Dataset._fingerprint` has no public reader, and our own cache names must contain it.
    """
    return str(getattr(table, "_fingerprint", ""))


def set_fingerprint(table: Dataset, fingerprint: str) -> None:
    """Name a table after the content of its file.

    Why private: `datasets` names a table after the file's path and time, which a changed file may keep, and only
    `Dataset.map` takes a name from the caller, at the price of a copy of the table.
    """
    table._fingerprint = fingerprint
