"""The numbers -1 and -100 in place of a label, as GLUE's test files and training libraries have them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import datasets
import pytest

from lit_peft import LitPeftError, TextClassificationData


def write(folder: Path, **labels: list[Any]) -> dict[str, str]:
    """Write a csv file of each split, with these labels."""
    for split, values in labels.items():
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            rows = [[f"the {split} film {number}", value] for number, value in enumerate(values)]
            csv.writer(stream).writerows([["text", "label"], *rows])
    return {split: str(folder / f"{split}.csv") for split in labels}


def data(encoder: Path, **settings: Any) -> TextClassificationData:
    return TextClassificationData(base=str(encoder), **{"validation_fraction": 0.0, **settings})


@pytest.mark.parametrize("label", [-1, -100])
def test_a_split_of_hidden_labels_is_refused_with_their_number(label: int, encoder: Path, tmp_path: Path) -> None:
    made = data(encoder, **write(tmp_path, train=[0, 1] * 4, test=[label] * 6))
    with pytest.raises(LitPeftError, match=rf"data.test .*6 of 6 rows \(100.0 %\) have the label {label}, which stand"):
        made.setup("test")


def test_some_rows_with_minus_one_are_a_class_that_is_said(
    encoder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    made = data(encoder, **write(tmp_path, train=[-1, 0, 1, 1], validation=[-1, 0]))
    made.setup("fit")
    assert made.label_names == ["-1", "0", "1"]
    said = [line for line in made.report() if "label -1" in line]
    assert (
        len(said) == 2
        and "data.train" in said[0]
        and "1 of 4 rows (25.0 %) have the label -1, which is a class" in said[0]
    )


def test_minus_one_that_is_no_class_is_refused(encoder: Path, tmp_path: Path) -> None:
    files = write(tmp_path, train=[0, 1] * 4, test=[0, -1, 1, -1])
    with pytest.raises(LitPeftError, match=r"2 of 4 rows \(50.0 %\) have the label -1"):
        data(encoder, **files).setup("test")
    with pytest.raises(LitPeftError, match=r"2 of 4 rows \(50.0 %\) have the label -1"):
        data(encoder, test=files["test"], labels=["0", "1"]).setup("test")
    data(encoder, test=files["test"], labels=["-1", "0", "1"]).setup("test")


def test_minus_a_hundred_is_never_a_class(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LitPeftError, match=r"3 of 8 rows \(37.5 %\) have the label -100, which stands for a label to i"
    ):
        data(encoder, **write(tmp_path, train=[0, 1, -100, 1, 0, -100, -100, 1])).setup("fit")


def test_hidden_labels_of_declared_classes_are_counted(encoder: Path, tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    for split, labels in {"train": [0, 1, 1, 0], "test": [-1, -1, -1]}.items():
        rows = {"text": [f"the {split} film {number}" for number in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    made = data(encoder, train=str(tmp_path / "train.parquet"), test=str(tmp_path / "test.parquet"))
    made.setup("fit")
    assert made.label_names == ["neg", "pos"]
    with pytest.raises(LitPeftError, match=r"3 of 3 rows \(100.0 %\) have the label -1"):
        made.setup("test")


def test_in_regression_they_are_numbers(encoder: Path, tmp_path: Path) -> None:
    made = data(encoder, regression=True, **write(tmp_path, train=[-1, 0.5, -100]))
    made.setup("fit")
    assert [row["labels"] for row in made.examples("train")] == [-1.0, 0.5, -100.0]
    assert not any("label" in line for line in made.report())
