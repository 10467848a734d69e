"""Examples that are too long: cut at their end, cut at their start, or dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lit_peft

LONG = "good film bad a the was"


def examples(data: Any, split: Any = "train") -> list[dict[str, Any]]:
    data.setup("fit")
    return [dict(example) for example in data.examples(split)]


@pytest.mark.parametrize("kind", ["text", "tags", "chat"])
def test_what_is_kept_of_a_long_example(kind: str, encoder: Path, decoder: Path, tmp_path: Path) -> None:
    words = LONG.split()
    rows: list[dict[str, Any]] = {
        "text": [{"text": LONG, "label": "x"}, {"text": "good", "label": "y"}],
        "tags": [{"tokens": words, "tags": ["A"] * 5 + ["B"]}, {"tokens": ["good"], "tags": ["A"]}],
        "chat": [{"instruction": LONG, "output": "bad film"}, {"instruction": "a", "output": "film"}],
    }[kind]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    makes = {
        "text": lit_peft.TextClassificationData,
        "tags": lit_peft.TokenClassificationData,
        "chat": lit_peft.InstructionData,
    }
    base = decoder if kind == "chat" else encoder
    given: dict[str, Any] = {"base": str(base), "train": str(file), "validation_fraction": 0.0}
    if kind == "chat":
        given["template"] = "plain"
    whole = examples(makes[kind](**given, max_length=64))
    lengths = [len(example["input_ids"]) for example in whole]
    limit = lengths[0] - 2
    assert lengths[1] <= limit
    for side in ("right", "left"):
        data = makes[kind](**given, max_length=limit, truncation_side=side)  # type: ignore[arg-type]
        found = examples(data)
        assert [len(example["input_ids"]) for example in found] == [limit, lengths[1]]
        assert found[1] == whole[1]
        cut, full = found[0]["input_ids"], whole[0]["input_ids"]
        special = {*data.tokenizer.all_special_ids}
        kept = [token for token in cut if token not in special]
        text = [token for token in full if token not in special]
        assert kept == (text[-len(kept) :] if side == "left" else text[: len(kept)])
        if kind == "tags":
            tags = [label for label in found[0]["labels"] if label != -100]
            last = [label for label in whole[0]["labels"] if label != -100][-1]
            assert (last in tags) is (side == "left")
        assert any("cut to" in line or "tokens lost" in line for line in data.report()), data.report()
    data = makes[kind](**given, max_length=limit, truncation_side="drop")  # type: ignore[arg-type]
    assert examples(data) == whole[1:]
    assert any("drop" in line for line in data.report()), data.report()


def test_a_stream_drops_long_examples_too(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": LONG, "label": "x"}, {"text": "good", "label": "y"}] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = lit_peft.TextClassificationData(
        base=str(encoder),
        train=str(file),
        streaming=True,
        labels=["x", "y"],
        max_length=5,
        truncation_side="drop",
        batch_size=2,
    )
    data.setup("fit")
    labels = [label for batch in data.train_dataloader() for label in batch["labels"].tolist()]
    assert labels == [1, 1, 1]
