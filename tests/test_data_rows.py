"""Filters, splits, overlap, limits, sources and measures of rows, without a data module or a trainer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

import datasets
import pytest

from lit_peft import CausalLMData, LitPeftError
from lit_peft.data.encoding import longest_and_largest, token_counts
from lit_peft.data.labels import canonical_label, parse_number
from lit_peft.data.notes import Notes
from lit_peft.data.rows import Rows, normalize_text, require_text, text_key
from lit_peft.data.sources import HubDataset, select_rows
from lit_peft.data.splits import (
    drop_duplicates,
    filter_rows,
    hold_out,
    sample_rows,
    split_rows,
    without_overlap,
)


def rows_of(texts: list[str | None], field: str = "data.train", **more: list[object]) -> Rows:
    table = datasets.Dataset.from_dict({"text": texts, **more})
    return Rows(table, list(range(len(texts))), field, "a.csv")


def by_text(table: datasets.Dataset) -> Callable[[int], Hashable]:
    return text_key(table, ["text", None])


def test_white_space_does_not_make_a_text_different() -> None:
    assert normalize_text(" a \n b\t") == "a b"
    key = by_text(rows_of(["a b", "a  b ", "A b"]).table)
    assert key(0) == key(1) != key(2)


def test_a_row_is_located_by_its_number_in_the_file() -> None:
    rows = rows_of(["a", "b"])
    assert rows.locate(1) == "data.train 'a.csv', row 2"
    assert Rows(rows.table, [0], "data.train", "a.csv", [17, 18]).locate(1) == "data.train 'a.csv', row 18"


def test_selected_rows_become_a_table() -> None:
    rows = rows_of(["a", "b", "c"])
    assert rows.to_table() is rows.table
    assert Rows(rows.table, [2, 0], "", "").to_table()["text"][:] == ["c", "a"]


@pytest.mark.parametrize("cell", [None, " \n"])
def test_an_empty_cell_is_refused_by_row_number(cell: str | None) -> None:
    with pytest.raises(LitPeftError, match=r"data.train 'a.csv', row 2 has no text in column 'text'"):
        require_text(rows_of(["a", cell]), ["text"])
    require_text(rows_of(["a", cell]), ["text"], may_be_empty=True)


def test_where_compares_values_and_their_text() -> None:
    assert filter_rows([0, 1, 2], [1, 2, 1], 1, "n", "data.train") == [0, 2]
    assert filter_rows([0, 1, 2], ["1", "2", "3"], [1, 3], "n", "data.train") == [0, 2]
    with pytest.raises(LitPeftError, match=r"no row of data.train has n = 7; 'n' has the values 1, 2\."):
        filter_rows([0, 1], [1, 2], 7, "n", "data.train")


def test_the_first_of_equal_rows_is_kept() -> None:
    assert drop_duplicates([3, 0, 1, 2], {0: "x", 1: "y", 2: "x", 3: "x"}.__getitem__) == [3, 1]


def test_groups_stay_together_and_parts_do_not_depend_on_later_fractions() -> None:
    groups = {index: index // 3 for index in range(90)}
    parts = split_rows(range(90), {"test": 0.2, "validation": 0.1}, groups.__getitem__, seed=5)
    assert sorted(index for part in parts.values() for index in part) == list(range(90))
    assert [len(parts[name]) for name in ("test", "validation", "train")] == [18, 9, 63]
    owners = [{groups[index] for index in part} for part in parts.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert all(part == sorted(part) for part in parts.values())
    assert split_rows(range(90), {"test": 0.2}, groups.__getitem__, seed=5)["test"] == parts["test"]
    assert split_rows(range(90), {"test": 0.2}, groups.__getitem__, seed=6)["test"] != parts["test"]
    with pytest.raises(LitPeftError, match="leaves no row for validation"):
        split_rows(range(3), {"validation": 0.1}, groups.__getitem__, seed=5)


def test_a_limit_draws_rows_in_their_order() -> None:
    assert sample_rows([4, 2, 9], None, 0) == sample_rows([4, 2, 9], 3, 0) == [4, 2, 9]
    drawn = sample_rows(range(100), 30, 1)
    assert drawn == sorted(drawn) and len(set(drawn)) == 30 and drawn == sample_rows(range(100), 30, 1)
    assert drawn != list(range(30))


def test_overlap_with_validation_and_test_is_removed_from_training() -> None:
    found = {
        "train": rows_of(["a", "b", "c ", "d"]),
        "validation": rows_of(["x", "b"], "data.validation"),
        "test": rows_of(["c"], "data.test"),
    }
    notes = Notes()
    assert without_overlap(found, by_text, notes).indices == [0, 3]
    assert notes.lines() == [
        "data.train: 2 of 4 rows (50.0 %) removed, because they also occur in validation or test.",
    ]
    with pytest.raises(LitPeftError, match=r"every row also occurs in data\.validation or data\.test"):
        without_overlap({"train": rows_of(["b"]), "test": rows_of(["b", "c"])}, by_text, Notes())


def test_held_out_rows_are_distinct_and_duplicates_are_counted() -> None:
    train, notes = rows_of([f"t{index % 20}" for index in range(40)]), Notes()
    key = by_text(train.table)
    parts = hold_out(train, {"test": 0.25, "validation": 0.25}, key, key, 0, notes)
    texts = {split: [train.table[index]["text"] for index in rows.indices] for split, rows in parts.items()}
    assert {split: len(part) for split, part in texts.items()} == {"train": 10, "test": 5, "validation": 5}
    assert sorted(text for part in texts.values() for text in part) == sorted({f"t{index}" for index in range(20)})
    assert notes.lines() == ["data.train: 20 of 40 rows (50.0 %) removed, because they are duplicates."]


def test_rows_are_selected_by_columns_and_values() -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "source": ["x", "y"]})
    rows = select_rows(table, "data.train", "a.csv", {"data.text_column": "text", "unused": None}, {"source": "y"})
    assert rows.indices == [1] and rows.table is table
    with pytest.raises(LitPeftError, match=r"no column 'texts' \(data.text_column\); it has 'text', 'source'"):
        select_rows(table, "data.train", "a.csv", {"data.text_column": "texts"}, {})


def test_a_source_is_a_file_or_a_split_of_the_dataset() -> None:
    nothing, hub = HubDataset(None), HubDataset("glue")
    hub.splits = {"train": datasets.Dataset.from_dict({"a": [1]}), "dev": None}
    assert nothing.find("train", None) is None and nothing.find("train", "x.csv") == "x.csv"
    assert not nothing.has("x.csv")
    assert [hub.find(split, None) for split in ("train", "validation", "test", "predict")] == [
        "train",
        "dev",
        None,
        None,
    ]
    assert hub.has("train") and not hub.has("x.csv")
    with pytest.raises(LitPeftError, match=r"data.test 'devs' is neither a file nor a split of 'glue'; nearest: 'dev'"):
        hub.find("test", "devs")


def test_a_file_that_could_not_be_read_is_reported_again(tmp_path: Path) -> None:
    data = CausalLMData(train=str(tmp_path / "a.jsonl"), validation_fraction=0)
    for _ in range(2):
        with pytest.raises(LitPeftError, match="does not exist"):
            data.setup("fit")
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    assert len(data.rows["train"]) == 1


def test_lengths_and_ids_are_measured() -> None:
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2], [7], [3, 4, 5]]})
    assert token_counts(table) == token_counts(list(table)) == [2, 1, 3]
    assert longest_and_largest(table) == (3, 7)
    choices = datasets.Dataset.from_dict({"input_ids": [[[1], [2, 9]], [[3, 4, 5]]]})
    assert token_counts(choices) == [2, 3] and longest_and_largest(choices) == (3, 9)
    assert longest_and_largest(None) == (0, 0)


def test_numbers_written_as_text_are_the_same_label() -> None:
    assert [canonical_label(value) for value in (1, 1.0, "1", " 1.0 ", "01", "x", "", None, True)] == [
        1,
        1,
        1,
        1,
        "01",
        "x",
        None,
        None,
        "true",
    ]
    assert [parse_number(value) for value in ("1e2", "x", None, "nan", "inf")] == [100.0, None, None, None, None]
