"""Every data module reports what is wrong with a file in one paragraph, with the row or with the line and column."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_peft.cli import main

# Data module -> whether its base is an encoder, its task, and a row with its columns.
MODULES: dict[str, tuple[bool, str, dict[str, Any]]] = {
    "TextClassificationData": (True, "sequence_classification", {"text": "good film", "label": "x"}),
    "TokenClassificationData": (True, "token_classification", {"tokens": ["good", "film"], "tags": ["O", "B-X"]}),
    "QuestionAnsweringData": (
        True,
        "question_answering",
        {"question": "it", "context": "good film", "answers": {"text": ["film"], "answer_start": [5]}},
    ),
    "MultipleChoiceData": (True, "multiple_choice", {"question": "it", "choices": ["good", "bad"], "answer": 1}),
    "CausalLMData": (False, "causal_lm", {"text": "good film"}),
    "InstructionData": (False, "causal_lm", {"instruction": "good", "output": "film"}),
    "ReasoningData": (False, "causal_lm", {"instruction": "good", "output": "The answer is 4", "answer": "4"}),
    "Seq2SeqData": (False, "seq2seq", {"source": "good", "target": "film"}),
}


def told(name: str, file: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run `lit-peft fit` on a file, and return what it says; it must be one paragraph."""
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    command = ["fit", "--model", "LoRA", "--model.base", str(base), "--model.task", MODULES[name][1], "--data", name]
    command += ["--data.train", str(file), "--trainer.max_steps", "1", "--trainer.logger", "false"]
    assert main(command) not in (0, None)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "lit-peft: error:" in line]
    assert (
        "Traceback" not in error and len(lines) == 1 and len(error[error.index("lit-peft: error:") :].split("\n")) < 5
    )
    return lines[0]


@pytest.mark.parametrize("name", MODULES)
def test_broken_files_are_reported(
    name: str,
    encoder: Path,
    decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encodes, _, row = MODULES[name]
    base = encoder if encodes else decoder
    line = json.dumps(row)

    def error(content: str | bytes, suffix: str = "jsonl") -> str:
        file = tmp_path / f"data.{suffix}"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return told(name, file, base, monkeypatch, capsys)

    assert "line 3 is not valid JSON (column" in error(f"{line}\n{line}\n{line[:-2]}\n{line}\n")
    assert "line 2 is not a JSON object" in error(f"{line}\n[1]\n")
    assert "broken JSON at line 2, column" in error(f"[{line},\n{line[:-2]}", "json")
    assert "is not UTF-8: byte 0xe9 in line 2" in error(line.encode() + b'\n{"text": "caf\xe9"}\n')
    assert "is empty (0 bytes)" in error("")
    if name == "TextClassificationData":  # The other checks of files do not depend on the data module.
        assert "has no rows" in error("[]", "json")
        assert "has no rows" in error("text,label\n", "csv")
        assert "line 3 has 3 cells" in error("text,label\ngood,x\ngood,x,y", "csv")
        assert "is not a readable parquet file" in error("PAR1", "parquet")
        assert "unknown suffix '.xlsx'" in error("a", "xlsx")
    # Without a solution, the gold answer is learned.
    for column in row.keys() - ({"output"} if name == "ReasoningData" else set()):
        others = {other: value for other, value in {**row, "more": "x"}.items() if other != column}
        said = error(json.dumps(others) + "\n")
        assert f"has no column {column!r}" in said and all(map(repr(said).__contains__, others)), said
        if column in ("answers", "tags"):
            continue  # Questions may have no answer; missing tags are reported with their words.
        said = error(f"{line}\n{json.dumps({**row, column: None})}\n{line}\n")
        assert "row 2" in said, said
        said = error(f"{line}\n{line}\n{json.dumps({**row, column: {'z': 1}})}\n")
        assert "row 3" in said, said


@pytest.mark.parametrize("train", [True, False])
def test_labels_that_do_not_occur_in_training_are_reported(
    train: bool, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    rows = ["text,label", "good film,pos", "great film,pos", "bad film,neg", "poor film,neg"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "other.csv").write_text("text,label\nit is great,pos\nit was,neutral\n")
    files = ["--data.train", "train.csv", f"--data.{'validation' if train else 'test'}", "other.csv"]
    command = ["fit" if train else "test"]
    command += ["--model", "LoRA", "--model.base", str(encoder), "--model.task", "sequence_classification"]
    command += ["--data", "TextClassificationData", *files, "--data.validation_fraction", "0"]
    assert main(command) == 2
    assert "row 2: label 'neutral' does not occur in training, which has 'neg', 'pos'" in capsys.readouterr().err
    assert not (tmp_path / "lit_peft_runs").exists()
