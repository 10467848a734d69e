"""Rows that a loss of embeddings cannot use are refused before the base is loaded, and named by their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

import lit_peft
from lit_peft import LitPeftError
from lit_peft.data import EmbeddingData
from lit_peft.training import module as training

FILMS = [{"query": f"film {number}", "document": f"{number} is good"} for number in range(12)]
NEGATIVES = [{**row, "negative": [f"{number} is bad"]} for number, row in enumerate(FILMS)]
SCORES = [{**row, "score": number / 12} for number, row in enumerate(FILMS)]
HALF = [{**row, "negative": ["bad", "weak"] if number % 2 else []} for number, row in enumerate(FILMS)]
ONE_LACKS = [{**row, "negative": None} if number == 7 else row for number, row in enumerate(NEGATIVES)]
BLANK = [{**row, "negative": ["  ", ""]} if number == 7 else row for number, row in enumerate(NEGATIVES)]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def data_of(base: Path, train: str, **settings: Any) -> EmbeddingData:
    settings = {"batch_size": 4, "max_length": 16, "validation_fraction": 0.0, **settings}
    return EmbeddingData(base=str(base), train=train, **settings)


def fit(base: Path, data: EmbeddingData, loss_type: str) -> pl.Trainer:
    module = lit_peft.LoRA(base=str(base), task="embedding", task_args={"loss_type": loss_type}, r=2)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=3, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("loss_type", "rows", "message"),
    [
        ("triplet", FILMS, "row 1 has no negative. task_args: loss_type='triplet' needs a negative in each row"),
        ("triplet", HALF, "row 1 has no negative."),
        ("triplet", ONE_LACKS, "row 8 has no negative."),
        ("triplet", BLANK, "row 8 has no negative."),
        ("triplet", SCORES, "row 1 has a score. task_args: loss_type='triplet' has no use for the rows' scores"),
        ("in_batch_negatives", SCORES, "row 1 has a score. task_args: loss_type='in_batch_negatives' has no use"),
        ("cosent", FILMS, "row 1 has no score. task_args: loss_type='cosent' needs a score in each row"),
        (
            "cosine",
            [{**row, "negative": "bad"} for row in SCORES],
            "row 1 has a negative. task_args: loss_type='cosine' has no use for the rows' negatives",
        ),
    ],
)
def test_rows_that_the_loss_cannot_use_are_refused_before_the_base_is_loaded(
    loss_type: str,
    rows: list[dict[str, Any]],
    message: str,
    streaming: bool,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "build_model", lambda module: pytest.fail("the base was loaded"))
    file = write(tmp_path, rows)
    with pytest.raises(LitPeftError) as found:
        fit(encoder, data_of(encoder, file, streaming=streaming), loss_type)
    assert str(found.value).startswith(f"data.train {file!r}, {message}")


def test_a_later_row_of_a_stream_without_a_negative_is_named(encoder: Path, tmp_path: Path) -> None:
    rows = [{"query": f"film {number}", "document": "good", "negative": "bad"} for number in range(40)]
    rows[30]["negative"] = ""
    file = write(tmp_path, rows)
    with pytest.raises(LitPeftError, match=r"rows.jsonl', row 31 has no negative\. task_args: loss_type='triplet'"):
        fit(encoder, data_of(encoder, file, streaming=True, shuffle_buffer=1), "triplet")


def test_validation_rows_need_a_negative_too(encoder: Path, tmp_path: Path) -> None:
    train = write(tmp_path, NEGATIVES)
    held_out = [{"query": "a film", "document": "great", "negative": "bad"}, {"query": "the film", "document": "weak"}]
    data = data_of(encoder, train, validation=write(tmp_path, held_out, "held_out.jsonl"))
    with pytest.raises(LitPeftError, match=r"data.validation '.*held_out.jsonl', row 2 has no negative"):
        fit(encoder, data, "triplet")


def test_rows_with_scores_validate_a_run_without(encoder: Path, tmp_path: Path) -> None:
    scored = [
        {"sentence1": f"the {word}", "sentence2": word, "score": at / 3} for at, word in enumerate(("bad", "good"))
    ]
    held_out = write(tmp_path, scored, "held_out.jsonl")
    data = data_of(encoder, write(tmp_path, NEGATIVES), validation=held_out)
    assert fit(encoder, data, "triplet").global_step == 3


def test_the_same_data_serves_a_loss_that_can_use_it(encoder: Path, tmp_path: Path) -> None:
    data = data_of(encoder, write(tmp_path, ONE_LACKS))
    with pytest.raises(LitPeftError, match="row 8 has no negative"):
        fit(encoder, data, "triplet")
    assert fit(encoder, data, "in_batch_negatives").global_step == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_an_empty_list_of_positives_are_counted(streaming: bool, encoder: Path, tmp_path: Path) -> None:
    rows = [{"query": f"film {number}", "pos": ["good", "great"] if number % 3 else []} for number in range(12)]
    data = data_of(encoder, write(tmp_path, rows), streaming=streaming, batch_size=32)
    assert next(iter(data.train_dataloader()))["texts"] == [16, 16, 0]
    assert "4 of 12 rows (33.3 %) dropped, because their list of positives is empty" in " ".join(data.report())


def test_a_file_whose_lists_of_positives_are_all_empty_is_refused(encoder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, [{"query": "good", "pos": ["film"]}, {"query": "bad", "pos": []}])
    empty = write(tmp_path, [{"query": "good", "pos": []}, {"query": "bad", "pos": []}], "empty.jsonl")
    for files in (empty, [file, empty]):
        with pytest.raises(LitPeftError, match=r"empty.jsonl': no row has a positive; each list of positives is empty"):
            data_of(encoder, files).setup("fit")


@pytest.mark.parametrize("streaming", [False, True])
def test_errors_name_the_row_of_the_file_that_had_several_positives(
    streaming: bool, encoder: Path, tmp_path: Path
) -> None:
    # Two rows for some and none for others: as many as the file has, but not the same ones.
    rows: list[dict[str, Any]] = [
        {"query": f"film {at}", "pos": ["good", "great"] if at % 2 else []} for at in range(6)
    ]
    rows[3]["pos"][1] = "  "
    data = data_of(encoder, write(tmp_path, rows), streaming=streaming)
    with pytest.raises(LitPeftError, match=r"^data.train '.*rows.jsonl', row 4 has no text in column 'positive'"):
        data.setup("fit")
    rows[3]["pos"][1] = "weak"
    rows = [{**row, "score": "high" if at == 5 else 1} for at, row in enumerate(rows)]
    other = write(tmp_path, [{"query": "a", "pos": ["b", "the"], "score": "1"}], "first.jsonl")
    data = data_of(encoder, [other, write(tmp_path, rows)], streaming=streaming)
    with pytest.raises(LitPeftError, match=r"^data.train '.*rows.jsonl', row 6: the score is 'high'"):
        data.setup("fit")
