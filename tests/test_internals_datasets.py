"""The private name of `datasets` that lit_peft uses behaves as lit_peft/data/datasets_internals.py says."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from lit_peft.data.datasets_internals import get_fingerprint, set_fingerprint
from lit_peft.data.files import read_file

pytestmark = pytest.mark.usefixtures("new_cache")


def doubled(batch: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"a": [2 * value for value in batch["a"]]}


def test_the_name_given_to_map_is_the_fingerprint() -> None:
    table = datasets.Dataset.from_dict({"a": [1, 2]}).map(doubled, batched=True, new_fingerprint="0123456789abcdef")
    assert get_fingerprint(table) == "0123456789abcdef"


def test_what_is_made_from_a_table_is_named_after_its_fingerprint() -> None:
    names = set()
    for name in ("first", "second"):
        table = datasets.Dataset.from_dict({"a": [1, 2, 3]})
        set_fingerprint(table, name)
        assert get_fingerprint(table) == name
        names.add(get_fingerprint(table.select([0, 2])))
        again = datasets.Dataset.from_dict({"a": [1, 2, 3]})
        set_fingerprint(again, name)
        assert get_fingerprint(again.select([0, 2])) in names
    assert len(names) == 2


def test_a_cached_result_is_found_by_its_name(tmp_path: Path) -> None:
    calls = []

    def counted(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        calls.append(1)
        return batch

    file = tmp_path / "a.csv"
    file.write_text("text\ngood\n")
    for _ in range(2):
        table = read_file(str(file), "data.train")
        table.map(counted, batched=True, new_fingerprint="fedcba9876543210")
    assert calls == [1]


def test_a_table_is_named_after_its_content_not_its_path(tmp_path: Path) -> None:
    for name, content in (("a.csv", "text\ngood\n"), ("b.csv", "text\ngood\n"), ("c.csv", "text\nbad\n")):
        (tmp_path / name).write_text(content)
    a, b, c = (get_fingerprint(read_file(str(tmp_path / f"{name}.csv"), "data.train")) for name in "abc")
    assert a == b != c
