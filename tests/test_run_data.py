"""What a run was trained on: recorded in its checkpoints, and compared when it is resumed, tested or continued."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from models import QUIET

import lit_peft
from lit_peft import CausalLMData, LitPeftError, TextClassificationData
from lit_peft.cli import main
from lit_peft.commands import compare
from lit_peft.commands.measure import measure
from lit_peft.commands.plan import Plan, search_cells
from lit_peft.commands.results import Results, finished_rows, left_out, newest_data, read_results
from lit_peft.data.record import data_record, examples_digest


@pytest.fixture
def file(reviews: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(reviews, tmp_path / "reviews.csv"))


def rewrite(file: Path, change: Any) -> None:
    """Put other rows into a csv file, whose path stays."""
    with file.open(newline="") as stream:
        header, *rows = list(csv.reader(stream))
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *change(rows)])


def fit(
    encoder: Path, file: Path, folder: Path, resume: Any = None, epochs: int = 1, module: Any = None, **data: Any
) -> Path:
    pl.seed_everything(0)
    settings = {"base": str(encoder), "train": str(file), "batch_size": 8, "limit_train": 24, **data}
    module = module or lit_peft.LoRA(base=str(encoder), task="sequence_classification", target_modules=["query"])
    trainer = pl.Trainer(
        max_epochs=epochs, default_root_dir=folder, limit_val_batches=1, enable_checkpointing=False, **QUIET
    )
    trainer.fit(module, TextClassificationData(**settings), ckpt_path=resume)
    stored = folder / f"{epochs}.ckpt"
    trainer.save_checkpoint(stored)
    return stored


CHANGES: dict[str, tuple[Any, str]] = {
    "other texts, as many": (lambda rows: [[text.replace("film", "it film"), label] for text, label in rows], "other"),
    "another order": (lambda rows: rows[::-1], "another order"),
    "fewer rows": (lambda rows: rows[:-40], "rows"),
    "other label names": (
        lambda rows: [[text, {"pos": "yes", "neg": "no"}[label]] for text, label in rows],
        "the labels were ['neg', 'pos'] and are ['no', 'yes'] now",
    ),
    "exchanged labels": (
        lambda rows: [[text, {"pos": "neg", "neg": "pos"}[label]] for text, label in rows],
        "data.train",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_resumed_on_other_data(change: str, encoder: Path, file: Path, tmp_path: Path) -> None:
    stored = fit(encoder, file, tmp_path / "runs")
    fit(encoder, file, tmp_path / "runs", stored, epochs=2)
    function, said = CHANGES[change]
    rewrite(file, function)
    with pytest.raises(LitPeftError, match="was trained on other data") as raised:
        fit(encoder, file, tmp_path / "runs", stored, epochs=2)
    message = str(raised.value)
    assert said in message and str(stored) in message and "model.adapter" in message
    assert change == "other label names" or "data.train was 24 rows with the hash" in message


def test_the_same_rows_in_another_file_are_the_same_data(encoder: Path, file: Path, tmp_path: Path) -> None:
    stored = fit(encoder, file, tmp_path / "runs")
    rows = list(csv.DictReader(file.open(newline="")))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fit(encoder, moved, tmp_path / "runs", stored, epochs=2).is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"limit_train": 20}, "24 rows with the hash"),
        ({"max_length": 3}, "settings that make examples of its rows differ"),
        ({"seed": 1}, "settings that make examples of its rows differ"),
        ({"validation_fraction": 0.0}, "is not given now"),
    ],
)
def test_settings_that_make_other_examples_are_other_data(
    settings: dict[str, Any], said: str, encoder: Path, file: Path, tmp_path: Path
) -> None:
    stored = fit(encoder, file, tmp_path / "runs")
    with pytest.raises(LitPeftError, match=said):
        fit(encoder, file, tmp_path / "runs", stored, epochs=2, **settings)


def test_another_tokenizer_is_named(encoder: Path, tokenizer_folder: Path, file: Path, tmp_path: Path) -> None:
    stored = fit(encoder, file, tmp_path / "runs")
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"film": 7', '"film": 39'))
    assert text != (other / "tokenizer.json").read_text()
    with pytest.raises(LitPeftError, match="the tokenizer or its chat template is another one"):
        fit(encoder, file, tmp_path / "runs", stored, epochs=2, tokenizer=str(other))


def test_a_checkpoint_without_the_record_is_resumed_as_before(encoder: Path, file: Path, tmp_path: Path) -> None:
    stored = fit(encoder, file, tmp_path / "runs")
    content = torch.load(stored, weights_only=True)
    assert content.pop("run")["data"]["splits"]["train"]["rows"] == 24
    torch.save(content, stored)
    rewrite(file, CHANGES["another order"][0])
    assert fit(encoder, file, tmp_path / "runs", stored, epochs=2).is_file()


def test_only_the_labels_matter_to_a_test(encoder: Path, file: Path, tmp_path: Path) -> None:
    stored = fit(encoder, file, tmp_path / "runs")
    trainer = pl.Trainer(default_root_dir=tmp_path, **QUIET)

    def test(**settings: Any) -> Any:
        module = lit_peft.LoRA(base=str(encoder), task="sequence_classification", target_modules=["query"])
        data = TextClassificationData(base=str(encoder), test=str(file), **settings)
        return trainer.test(module, data, ckpt_path=stored, verbose=False)

    rewrite(file, CHANGES["another order"][0])
    assert 0 <= test(labels=["neg", "pos"])[0]["test_accuracy"] <= 1
    rewrite(file, CHANGES["other label names"][0])
    with pytest.raises(LitPeftError, match=r"the labels were \['neg', 'pos'\] and are \['no', 'yes'\] now"):
        test(labels=["no", "yes"])


def test_a_stream_is_known_by_its_first_rows_and_its_size(decoder: Path, file: Path, tmp_path: Path) -> None:
    def record() -> Any:
        data = CausalLMData(base=str(decoder), train=str(file), streaming=True, validation_fraction=0.0)
        data.setup("fit")
        return data_record(data)["splits"]["train"]

    before = record()
    assert before == record() and before["rows"] is None
    rewrite(file, lambda rows: [["the story is good", "pos"], *rows[1:]])
    assert record()["hash"] != before["hash"]


def test_the_command_writes_the_record_and_refuses_before_it_writes(
    decoder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    model = ["--model", "LoRA", "--model.base", str(decoder), "--data", "CausalLMData", "--data.train", str(file)]
    runs = tmp_path / "runs"
    place = ["--trainer.default_root_dir", str(runs), "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    command = ["fit", *model, "--data.limit_train", "16", *place, "--trainer.enable_progress_bar", "false"]
    assert main(command) == 0
    written = json.loads((runs / "version_0" / "data.json").read_text())
    last = runs / "version_0" / "checkpoints" / "last.ckpt"
    assert written == torch.load(last, weights_only=True)["run"]["data"]
    assert written["splits"]["train"]["rows"] == 16 and len(written["splits"]["train"]["hash"]) == 16
    rewrite(file, CHANGES["another order"][0])
    content = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    for path in ("last", str(last)):
        assert main([*command, "--ckpt_path", path]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "was trained on other data: data.train was 16 rows" in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == content


def test_the_hash_is_that_of_the_contents_alone() -> None:
    rows = {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [0, 1, 2], "text": ["a", None, "b"]}
    table = Dataset.from_dict(rows)
    same = [
        Dataset.from_list([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]),
        table.select([2, 0, 1]).select([1, 2, 0]),
        Dataset.from_dict({name: rows[name] for name in ("text", "labels", "input_ids")}),
    ]
    assert {examples_digest(other) for other in same} == {examples_digest(table)}
    others = [
        {**rows, "input_ids": [[1], [2, 3], [4, 5, 6]]},
        {**rows, "labels": [0, 1, 3]},
        {**rows, "text": ["a", "", "b"]},
        {name: values[::-1] for name, values in rows.items()},
        {name: values[:2] for name, values in rows.items()},
    ]
    assert len({examples_digest(table), *(examples_digest(Dataset.from_dict(other)) for other in others)}) == 6


def test_a_comparison_has_runs_of_one_data_set(
    encoder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, which is faster than a new one for each run.
    monkeypatch.setattr(compare, "measure_in_process", measure)
    config, folder = tmp_path / "compare.yaml", tmp_path / "out"
    config.write_text(
        f"base: {encoder}\ntask: sequence_classification\ntrainer: {{accelerator: cpu}}\noutput: {folder}\n"
        f"data: {{class_path: TextClassificationData, init_args: {{train: {file}, limit_train: 16}}}}\n"
        "methods: {HeadOnly: {}}\nsteps: 1\nevaluations: 1\ntrials: 1\nseeds: 1\n"
    )

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]

    def run() -> str:
        plan = compare.check_plan(compare.read_plan(["--config", str(config)])[0])
        compare.compare(plan, Results(folder / "results.jsonl"))
        return capsys.readouterr().out

    folder.mkdir()
    assert "(finished before)" not in run() and "(finished before)" in run() and len(rows()) == 1
    # A row of an earlier version, whose key has no data in it.
    old = {name: value for name, value in rows()[0].items() if name != "data_hash"}
    with (folder / "results.jsonl").open("a") as stream:
        stream.write(json.dumps({**old, "cell": "0" * 16, "validation": 0.123}) + "\n")
    rewrite(file, CHANGES["another order"][0])
    assert "(finished before)" not in run() and len(rows()) == 3
    assert len({row.get("data_hash") for row in rows()}) == 3
    plan = compare.check_plan(compare.read_plan(["--config", str(config)])[0])
    known = read_results(folder / "results.jsonl")
    assert finished_rows(plan, known) == [rows()[2]] and newest_data(known) == plan.data_hash
    assert "kept in results.jsonl: 1 on other data and 1 of an earlier version" in left_out(plan, known)


def test_a_comparison_notices_data_that_changes_while_it_runs(encoder: Path, file: Path) -> None:
    data = {"class_path": "TextClassificationData", "init_args": {"train": str(file), "limit_train": 16}}
    plan = compare.check_plan(Plan(str(encoder), "sequence_classification", data, {"HeadOnly": {}}, steps=1, trials=1))
    rewrite(file, CHANGES["another order"][0])
    with pytest.raises(LitPeftError, match="data has changed since the comparison began"):
        measure(search_cells(plan, "HeadOnly")[0])
