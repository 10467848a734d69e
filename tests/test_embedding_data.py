"""Rows of anchors, positives, negatives and scores: the columns that are found, the batches, the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft import LitPeftError
from lit_peft.cli import main
from lit_peft.data import EmbeddingData

ROWS = [
    {"a": "good film", "b": "great story", "c": "bad acting"},
    {"a": "the acting is weak", "b": "poor acting", "c": "wonderful"},
    {"a": "it is awful", "b": "bad", "c": "great"},
]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def named(*names: str, rows: Any = ROWS) -> list[dict[str, Any]]:
    return [dict(zip(names, row.values(), strict=False)) for row in rows]


def module(base: Path, train: str | None, **settings: Any) -> EmbeddingData:
    settings = {"batch_size": 8, "max_length": 16, "validation_fraction": 0.0, **settings}
    return EmbeddingData(base=str(base), train=train, **settings)


def first(data: Any, split: str = "train") -> dict[str, Any]:
    loader = {"train": data.train_dataloader, "predict": data.predict_dataloader}[split]()
    return dict(next(iter(loader)))


def texts(data: Any, batch: dict[str, Any]) -> list[str]:
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [data.tokenizer.decode(ids[mask]) for ids, mask in rows]


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("anchor", "positive", "negative"), "anchor 'anchor', positive 'positive', negatives 'negative'"),
        (("query", "document", "hard_negative"), "anchor 'query', positive 'document', negatives 'hard_negative'"),
        (("query", "pos", "neg"), "anchor 'query', positive 'pos', negatives 'neg'"),
        (("question", "answer", "negative_1"), "anchor 'question', positive 'answer', negatives 'negative_1'"),
        (("sentence1", "sentence2"), "anchor 'sentence1', positive 'sentence2'."),
        (("text1", "text2", "label"), "positive 'text2'; 'label' is not read (data.score_column reads it as a score)"),
        (("title", "abstract"), "anchor 'title', positive 'abstract'."),
    ],
)
def test_columns_are_found_by_their_names(names: tuple[str, ...], note: str, encoder: Path, tmp_path: Path) -> None:
    data = module(encoder, write(tmp_path, named(*names)))
    batch = first(data)
    assert note in " ".join(data.report())
    has_negative = len(names) == 3 and names[2] != "label"
    assert batch["texts"] == [3, 3, 3 if has_negative else 0]
    # Each anchor's positive is in the same place among the positives.
    found = texts(data, batch)
    order = [next(i for i, row in enumerate(ROWS) if row["a"] == text) for text in found[:3]]
    assert found[3:6] == [ROWS[row]["b"] for row in order]
    if has_negative:
        assert found[6:] == [ROWS[row]["c"] for row in order] and batch["owners"].tolist() == [0, 1, 2]


def test_settings_name_the_columns(encoder: Path, tmp_path: Path) -> None:
    rows = [{**row, "anchor": "awful", "negative_1": "awful"} for row in ROWS]
    settings = {"anchor_column": "a", "positive_column": "b", "negative_columns": ["c"]}
    data = module(encoder, write(tmp_path, rows), **settings)
    assert "awful" not in texts(data, first(data))
    data = module(encoder, write(tmp_path, rows), **{**settings, "negative_columns": []})
    assert first(data)["texts"] == [3, 3, 0]


def test_rows_may_have_any_number_of_negatives(encoder: Path, tmp_path: Path) -> None:
    rows = [
        {"query": "good film", "positive": "great film", "negatives": ["bad", "awful story"], "negative_2": "weak"},
        {"query": "bad film", "positive": "poor film", "negatives": [], "negative_2": None},
        {"query": "weak film", "positive": "awful film", "negatives": None, "negative_2": "good"},
    ]
    data = module(encoder, write(tmp_path, rows))
    batch = first(data)
    found = texts(data, batch)
    assert batch["texts"] == [3, 3, 4] and len(found) == 10
    by_owner: dict[str, list[str]] = {}
    for text, owner in zip(found[6:], batch["owners"].tolist(), strict=True):
        by_owner.setdefault(found[owner], []).append(text)
    assert by_owner == {"good film": ["bad", "awful story", "weak"], "weak film": ["good"]}


def test_each_of_several_positives_gives_a_row(encoder: Path, tmp_path: Path) -> None:
    rows = [{"query": "good film", "pos": ["great film", "wonderful film"], "neg": ["bad", "weak"]}]
    rows.append({"query": "bad film", "pos": ["awful film"], "neg": ["good", "great"]})
    data = module(encoder, write(tmp_path, rows))
    batch = first(data)
    assert batch["texts"] == [3, 3, 6]
    found = texts(data, batch)
    assert sorted(zip(found[:3], found[3:6], strict=True)) == [
        ("bad film", "awful film"),
        ("good film", "great film"),
        ("good film", "wonderful film"),
    ]


def test_equal_texts_have_equal_keys(encoder: Path, tmp_path: Path) -> None:
    rows = [*named("query", "document"), {"query": "good film", "document": "poor acting"}]
    data = module(encoder, write(tmp_path, rows))
    batch = first(data)
    found, keys = texts(data, batch), batch["keys"].tolist()
    assert len(set(keys)) == len(set(found)) == 6 and len(keys) == 8
    assert all((one == other) == (key == its) for one, key in zip(found, keys) for other, its in zip(found, keys))  # noqa: B905
    assert max(keys) < 2**48


def test_scores_are_numbers(encoder: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": row["a"], "sentence2": row["b"], "score": str(i / 4)} for i, row in enumerate(ROWS)]
    data = module(encoder, write(tmp_path, rows))
    batch = first(data)
    scores = dict(zip(texts(data, batch), batch["scores"].tolist(), strict=False))
    assert scores == {"good film": 0.0, "the acting is weak": 0.25, "it is awful": 0.5}
    assert batch["scores"].dtype == torch.float32
    assert "scores" not in first(module(encoder, write(tmp_path, rows), score_column=""))
    rows[1]["score"] = "high"
    with pytest.raises(LitPeftError, match=r"row 2: the score is 'high'; give a number"):
        module(encoder, write(tmp_path, rows)).setup("fit")


def test_prefixes_stand_before_each_text(encoder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, named("query", "document", "negative"))
    data = module(encoder, file, prefixes={"anchor": "the ", "positive": "a "}, predict=file)
    found = texts(data, first(data))
    assert all(text.startswith("the ") for text in found[:3]) and all(text.startswith("a ") for text in found[3:])
    assert texts(data, first(data, "predict")) == [f"the {row['a']}" for row in ROWS]
    assert "column 'query' get the prefix 'the '" in " ".join(data.report())
    data = module(encoder, file, prefixes={"anchor": "the ", "positive": "a "}, predict=file, text_column="document")
    assert texts(data, first(data, "predict")) == [f"a {row['b']}" for row in ROWS]
    plain = write(tmp_path, [{"text": "good"}], "plain.jsonl")
    data = module(encoder, file, prefixes={"anchor": "the "}, predict=plain)
    assert texts(data, first(data, "predict")) == ["good"]
    assert "column 'text' get no prefix; data.prefixes.text gives one" in " ".join(data.report())


def test_lines_of_a_text_file_are_embedded(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("good film\nbad film\n")
    data = module(encoder, None, predict=str(tmp_path / "lines.txt"))
    batch = first(data, "predict")
    assert texts(data, batch) == ["good film", "bad film"] and "texts" not in batch


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_are_made_of_single_texts(streaming: bool, encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": "good film great story acting"}, {"text": "bad film awful story"}, {"text": "weak"}]
    data = module(encoder, write(tmp_path, rows), pairs="halves", streaming=streaming)
    batch = first(data)
    found = texts(data, batch)
    assert batch["texts"] == [2, 2, 0]
    assert set(zip(found[:2], found[2:], strict=True)) == {
        ("good film", "great story acting"),
        ("bad film", "awful story"),
    }
    assert "1 of 3 rows (33.3 %) dropped, because a text of one word has no halves" in " ".join(data.report())
    data = module(encoder, write(tmp_path, rows), pairs="same", streaming=streaming)
    found = texts(data, first(data))
    assert found[:3] == found[3:] and sorted(found[:3]) == sorted(row["text"] for row in rows)


def test_a_stream_gives_the_rows_of_the_file(encoder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, named("query", "document", "negative"))
    plain, stream = module(encoder, file), module(encoder, file, streaming=True)
    one, other = (sorted(texts(data, first(data))) for data in (plain, stream))
    assert one == other and len(one) == 9


def test_the_documents_of_a_query_are_in_one_split(encoder: Path, tmp_path: Path) -> None:
    rows = [{"query": f"film {word}", "document": text} for word in ("good", "bad", "weak", "poor") for text in "abcde"]
    data = module(encoder, write(tmp_path, rows), validation_fraction=0.3)
    queries = [
        {data.rows[split].table["anchor"][index] for index in data.rows[split].indices}
        for split in ("train", "validation")
    ]
    assert queries[0] and queries[1] and not queries[0] & queries[1]


def test_cuts_are_counted_and_padding_is_on_the_side_asked_for(encoder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, named("query", "document"))
    data = module(encoder, file, max_length=2, padding_side="left")
    batch = first(data)
    assert batch["input_ids"].shape == (6, 2) and not batch["attention_mask"][:, 0].all()
    assert batch["attention_mask"][:, -1].all() and batch["lengths"] == batch["attention_mask"].sum(1).tolist()
    assert "2 of 3 rows (66.7 %) cut to 2 tokens (data.max_length); 3 tokens lost" in " ".join(data.report())


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (named("x", "y"), {}, "has none of the columns anchor, query, question"),
        (named("query", "y"), {}, "name the column with data.positive_column"),
        (named("query", "document"), {"negative_columns": ["z"]}, r"has no column 'z' \(data.negative_columns\[0\]\)"),
        (named("query", "document"), {"score_column": "z"}, r"has no column 'z' \(data.score_column\)"),
        (named("query", "document"), {"positive_column": "query"}, "one column has two places"),
        ([{"query": "good", "document": ""}], {}, "row 1 has no text in column 'positive'"),
        ([{"query": "good", "document": "bad", "negatives": [{"a": 1}]}], {}, "row 1: a negative is"),
        (named("query", "document"), {"prefixes": {"query": "a"}}, "data.prefixes has 'query', which is not known"),
        (named("query", "document"), {"pairs": "thirds"}, "data.pairs is 'thirds'; use 'halves' or 'same'"),
        (named("text"), {"pairs": "same", "anchor_column": "a"}, "data.anchor_column is set but has no effect"),
        ([{"text": "good"}], {"pairs": "halves"}, "no text has two words"),
    ],
)
def test_what_is_wrong_is_refused(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(LitPeftError, match=message):
        module(encoder, write(tmp_path, rows), **settings).setup("fit")


def test_the_data_command_shows_the_texts_of_a_row(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, named("query", "document", "negative"))
    whole = ["--data.validation_fraction", "0"]
    assert main(["data", "--data", "EmbeddingData", "--data.train", file, "--data.base", str(encoder), *whole]) == 0
    out = capsys.readouterr().out
    assert "(0)" in out and "(2)" in out and "good film" in out


def test_init_writes_a_configuration_that_trains(encoder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, [{"query": f"film {number}", "document": f"{number} is good"} for number in range(30)])
    out = str(tmp_path / "config.yaml")
    given = ["--task", "embedding", "--base", str(encoder), "--method", "LoRA", "--data", file, "--output", out]
    assert main(["init", *given]) == 0
    runs = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", out, *runs]) == 0
