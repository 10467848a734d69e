"""Odd and broken files through the command: one clear paragraph and no incomplete output, or the right result."""

from __future__ import annotations

import bz2
import gzip
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from lit_peft.cli import main

ROWS = [{"text": f"{word} film", "label": label} for word, label in zip(("good", "bad"), ("pos", "neg"), strict=True)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "text,label\ngood film,pos\nbad film,neg\n"

# Name of the file, its content (None: a folder), and a part of the error message.
BROKEN: list[tuple[str, str | bytes | None, str]] = [
    ("latin.jsonl", LINES.encode() + b'{"text": "caf\xe9", "label": "pos"}', "not UTF-8: byte 0xe9 in line 3"),
    ("latin.csv", TABLE.encode() + b"caf\xe9,pos\n", "not UTF-8: byte 0xe9 in line 4"),
    ("utf16.jsonl", LINES.encode("utf-16"), "is UTF-16, not UTF-8"),
    ("utf16.csv", TABLE.encode("utf-16"), "is UTF-16, not UTF-8"),
    ("empty.jsonl", "", "is empty (0 bytes)"),
    ("empty.parquet", "", "is empty (0 bytes)"),
    ("blank.jsonl", "\n \n", "has no rows"),
    ("blank.csv", "\n\n", "has no rows"),
    ("header.csv", "text,label\n", "has no rows"),
    ("none.json", "[]", "has no rows"),
    ("none.parquet", Dataset.from_list(ROWS).select([]), "has no rows"),  # type: ignore[list-item]
    ("nul.jsonl", "\0\0", "line 1 is not valid JSON"),
    ("line.jsonl", LINES + '{"text": "x"\n', "line 3 is not valid JSON (column 13"),
    ("comma.jsonl", LINES + '{"text": "x", "label": "pos"},\n', "line 3 is not valid JSON (column 30"),
    ("comma.json", f"[{json.dumps(ROWS[0])},\n]", "broken JSON at line 2, column 1"),
    ("cut.json", json.dumps(ROWS)[:-3], "broken JSON at line 1"),
    ("more.json", json.dumps(ROWS) + "[", "there is text after the end of the list"),
    ("numbers.json", "[1, 2]", "row 1 is not a JSON object ('1')"),
    ("null.json", '[null, {"text": "x"}]', "row 1 is not a JSON object ('null')"),
    ("infinity.json", '[Infinity, {"text": {}}]', "row 1 is not a JSON object ('Infinity')"),
    ("lists.json", '[["text", "label"], ["good", "pos"]]', "row 1 is not a JSON object"),
    ("text.json", '"good"', "line 1 is not a JSON object"),
    ("columns.json", json.dumps({"text": ["good"], "label": ["pos"]}), "row 1: column 'text' has ['good']"),
    ("splits.json", json.dumps({"train": ROWS}), "no column 'text' (data.text_column); it has 'train'"),
    ("deep.jsonl", LINES + '{"m":' * 9_000, "line 3 is nested too deeply"),
    ("deep.json", '[{"m":' + "[" * 9_000, "row 1 is nested too deeply"),
    ("half.jsonl", LINES + '{"text": "\\ud83d", "label": "pos"}', "line 3 has half of a surrogate pair"),
    ("column.jsonl", '{"txt": "good", "label": "pos"}', "no column 'text' (data.text_column); it has 'txt', 'label'"),
    ("column.csv", "good film,pos\nbad film,neg\n", "no column 'text' (data.text_column); it has 'good film', 'pos'"),
    ("twice.csv", "text,text,label\na,b,pos\n", "repeated column names (['text'])"),
    ("cells.csv", TABLE + "a,b,pos\n", "line 4 has 3 cells"),
    ("short.csv", TABLE + "good\n", "row 3 has no label"),
    ("quote.csv", TABLE + '"good,pos\n', "a quote opened in row"),
    ("text.jsonl", LINES + '{"text": null, "label": "pos"}', "row 3 has no text"),
    ("list.jsonl", LINES + '{"text": ["x"], "label": "pos"}', "row 3: column 'text' has ['x'], which is not text"),
    ("label.jsonl", LINES + '{"text": "x"}', "row 3 has no label"),
    ("nan.jsonl", LINES + '{"text": "x", "label": NaN}', "row 3 has no label"),
    ("inf.jsonl", LINES + '{"text": "x", "label": -Infinity}', "row 3 has no label"),
    ("real.jsonl", LINES + '{"text": "x", "label": 1.5}', "row 3: 1.5 in data.label_column is not a class"),
    ("a.zip", b"PK\x03\x04", "is compressed; unpack it"),
    ("a.jsonl.gz", gzip.compress(LINES.encode())[:20], "is not a readable .gz file"),
    ("gz.jsonl", gzip.compress(LINES.encode()), "is compressed; unpack it"),
    ("bz.csv", bz2.compress(TABLE.encode()), "is compressed; unpack it"),
    ("page.json", "<!DOCTYPE html><html></html>", "is a web page"),
    ("pointer.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only a Git LFS pointer"),
    ("bad.parquet", b"PAR1 no", "not a readable parquet file"),
    (
        "bytes.parquet",
        Dataset.from_dict({"text": [b"good", b"bad"], "label": ["pos", "neg"]}),  # type: ignore[list-item]
        "row 1: column 'text' has b'good', which is not text",
    ),
    ("folder.jsonl", None, "is a folder"),
    ("folder", None, "is a folder"),
    ("rows", LINES, "has the unknown suffix ''"),
]
# Files that are read, and the texts and labels that they hold.
READ: list[tuple[str, str | bytes, list[tuple[str, str]]]] = [
    (
        "quotes.csv",
        'text,label\n"a ""good"" film,\nwas, it",pos\n"bad\r\nfilm",neg\n',
        [('a "good" film,\nwas, it', "pos"), ("bad\r\nfilm", "neg")],
    ),
    ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode(), [("good film", "pos"), ("bad film", "neg")]),
    ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), [("good film", "pos"), ("bad film", "neg")]),
    ("bom.csv", b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode(), [("good film", "pos"), ("bad film", "neg")]),
    ("crlf.jsonl", LINES.replace("\n", "\r\n"), [("good film", "pos"), ("bad film", "neg")]),
    (
        "double.jsonl",
        '{"text": "bad", "text": "good", "label": "pos"}\n{"text": "\u2028bad", "label": "neg", "m": [NaN, 1e999]}',
        [("good", "pos"), ("\u2028bad", "neg")],
    ),
    (
        "wide.jsonl",
        '{"text": "x", "label": 100000000000000000000000}\n{"text": "y", "label": 1, "m": ' + "[" * 90 + "]" * 90 + "}",
        [("x", "100000000000000000000000"), ("y", "1")],
    ),
    ("a.tsv", "text\tlabel\na, b\tpos\n7\tNA\n", [("a, b", "pos"), ("7", "NA")]),
    (
        "more.parquet",
        Dataset.from_list([{**row, "more": [{"x": 0.5}], "other": b"\xff"} for row in ROWS]),  # type: ignore[list-item]
        [("good film", "pos"), ("bad film", "neg")],
    ),
]


@pytest.fixture(autouse=True)
def folder(new_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])


def write(name: str, content: Any) -> None:
    if content is None:
        Path(name).mkdir()
    elif isinstance(content, Dataset):
        content.to_parquet(name)
    else:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def command(stage: str, base: Path, **data: Any) -> list[str]:
    """The command with a configuration, as a user has it."""
    model = {"class_path": "LoRA", "init_args": {"base": str(base), "task": "sequence_classification"}}
    given = {"max_length": 16, "validation_fraction": 0, **data}
    trainer: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer.update({"max_steps": 1} if stage == "fit" else {})
    trainer["default_root_dir"] = "runs"
    settings = {"model": model, "data": {"class_path": "TextClassificationData", "init_args": given}}
    Path("run.yaml").write_text(yaml.safe_dump({**settings, "trainer": trainer}))
    return [stage, "--config", "run.yaml", *(["--output", "out.jsonl"] if stage == "predict" else [])]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_file_is_reported(
    name: str, content: Any, said: str, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(name, content)
    labels = ["neg", "pos"]
    runs: list[tuple[str, dict[str, Any]]] = [
        ("fit", {"train": name}),
        ("fit", {"train": name, "streaming": True, "labels": labels}),
        ("test", {"test": name, "labels": labels}),
        *([] if "label" in said else [("predict", {"predict": name, "labels": labels})]),
    ]
    for stage, data in runs:
        assert main(command(stage, encoder, **data)) == 2
        error = capsys.readouterr().err
        told = error[error.index("lit-peft: error:") :].strip()
        assert len(told.splitlines()) == 1 and "Traceback" not in error
        assert said in told and f"data.{next(iter(data))} {name!r}" in told, (data, told)
        assert {path.name for path in Path().iterdir()} <= {name, "run.yaml", "cache"}
        assert not [path for path in Path("cache").rglob(".*") if not path.name.endswith(".lock")]


@pytest.mark.parametrize(("name", "content", "rows"), READ, ids=[case[0] for case in READ])
def test_an_odd_file_is_read(
    name: str, content: Any, rows: list[tuple[str, str]], encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, content)
    found: list[tuple[str, str]] = []
    from lit_peft.data import text_classification

    plain = text_classification.encode_texts

    def noted(batch: dict[str, list[Any]], **settings: Any) -> Any:
        labels = batch[settings["label_column"]] if settings["label_column"] else [""] * len(batch["text"])
        found.extend(zip(map(str, batch["text"]), map(str, labels), strict=True))
        return plain(batch, **settings)

    monkeypatch.setattr(text_classification, "encode_texts", noted)
    labels = sorted(label for _, label in rows)
    assert main(command("fit", encoder, train=name)) == 0 and found == rows
    found.clear()
    # The first rows are tried before training goes through all.
    assert main(command("fit", encoder, train=name, labels=labels, streaming=True, shuffle_buffer=1)) == 0
    assert set(found) == set(rows)
    assert main(command("predict", encoder, predict=name, labels=labels)) == 0
    assert [json.loads(line)["row"] for line in Path("out.jsonl").read_text().splitlines()] == [*range(len(rows))]


def test_one_row(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("one.csv", TABLE[: TABLE.index("bad")])
    assert main(command("fit", encoder, train="one.csv", labels=["neg", "pos"])) == 0
    assert main(command("test", encoder, test="one.csv", labels=["neg", "pos"])) == 0
    assert main(command("fit", encoder, train="one.csv")) == 2
    assert "has only the label 'pos'" in capsys.readouterr().err


@pytest.mark.heavy
def test_the_installed_command_leaves_nothing(encoder: Path) -> None:
    """It stops with exit status 2 and one paragraph, also with workers."""
    write("bad.jsonl", LINES * 40 + "[1]\n")
    call = [str(Path(sysconfig.get_path("scripts")) / "lit-peft")]
    data: dict[str, Any] = {"labels": ["neg", "pos"], "num_workers": 2}
    for stage, split in (("fit", {"train": "bad.jsonl", "streaming": True}), ("predict", {"predict": "bad.jsonl"})):
        done = subprocess.run(call + command(stage, encoder, **data, **split), capture_output=True, text=True)
        told = done.stderr[done.stderr.index("lit-peft: error:") :].strip()
        assert done.returncode == 2 and "Traceback" not in done.stderr and len(told.splitlines()) == 1
        assert "line 81 is not a JSON object ('[1]')" in told
        assert {path.name for path in Path().iterdir()} <= {"bad.jsonl", "run.yaml", "cache", "runs"}
        assert not [path for path in Path("runs").rglob("*") if path.suffix in (".ckpt", ".safetensors")]
