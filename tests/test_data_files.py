"""Files as users have them: those that can be read, and the errors of those that cannot."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from lit_peft import LitPeftError, TextClassificationData
from lit_peft.data import json_rows
from lit_peft.data.conll import read_conll
from lit_peft.data.even_shards import DropSurplus, EvenShards
from lit_peft.data.files import column_values, read_file
from lit_peft.data.text_encoding import encode_texts

pytestmark = pytest.mark.usefixtures("new_cache")


def data(encoder: Path, file: Path, **settings: object) -> TextClassificationData:
    return TextClassificationData(base=str(encoder), train=str(file), validation_fraction=0, **settings)


def test_a_csv_with_quotes_and_newlines(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,label\n"a ""good"" film,\nwas great",pos\n"the story\r\nwas bad",NA\n')
    made = data(encoder, file)
    made.setup("fit")
    rows = made.rows["train"].table
    assert rows["text"][0] == 'a "good" film,\nwas great' and rows["text"][1].split() == ["the", "story", "was", "bad"]
    assert made.label_names == ["NA", "pos"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_as_spreadsheets_write_it(separator: str, encoder: Path, tmp_path: Path) -> None:
    """With a byte order mark, CRLF, and other separators than commas."""
    lines = ["text|label", '"a good, great; film"|pos', "the bad, story|neg" if separator != "," else "bad|neg"]
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(line.replace("|", separator) for line in lines).encode())
    table = data(encoder, file).rows["train"].table
    assert table.column_names == ["text", "label"] and table["text"][0] == "a good, great; film"
    assert list(table["label"]) == ["pos", "neg"]


def test_one_row(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good film", "label": "pos"}\n')
    made = data(encoder, file, labels=["neg", "pos"])
    batch = next(iter(made.train_dataloader()))
    assert batch["labels"].tolist() == [1]
    with pytest.raises(LitPeftError, match="only the label 'pos'"):
        data(encoder, file).setup("fit")


def test_parquet_with_extra_columns(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = {"id": [1, 2], "text": ["good", "bad"], "more": [{"x": [1.5]}, {"x": []}], "label": [0, 1]}
    Dataset.from_dict(rows).to_parquet(file)
    batch = next(iter(data(encoder, file, batch_size=2).train_dataloader()))
    assert set(batch) >= {"input_ids", "attention_mask", "labels"} and "more" not in batch
    assert sorted(batch["labels"].tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "label": 1\n', "line 2"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n["b", 1]\n', "line 2"),
        ("a.json", b'[{"text": "a", "label": 0}, {"text": ]', "line 1"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": "caf\xe9", "label": 1}\n', "not UTF-8: byte 0xe9 in line 2"),
        ("a.csv", b"text,label\ncaf\xe9,0\n", "not UTF-8: byte 0xe9 in line 2"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.csv", b"text,label\na,0\nb,1,2\n", "line 3 has 3 cells"),
        ("a.csv", b'text,label\n"a,0\nb,1\n', "never closed"),
        ("a.csv", b"txt,label\na,0\n", "no column 'text'.*it has 'txt', 'label'"),
        ("a.csv", b"text,label\na,0\n ,1\n", "row 2 has no text"),
        ("a.csv", b"text,label\na,0\nb,\n", "row 2 has no label"),
        ("a.parquet", b"PAR1 no", "not a readable parquet file"),
        ("a.xlsx", b"x", "unknown suffix '.xlsx'"),
    ],
)
def test_what_is_wrong_is_reported_with_its_position(
    name: str, content: bytes, said: str, encoder: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(LitPeftError, match=said) as problem:
        data(encoder, file).setup("fit")
    assert "data.train" in str(problem.value) and len(str(problem.value).splitlines()) == 1


def table(file: Path, *rows: Any) -> Any:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_file(str(file), "data.train")


def test_json_columns_are_what_they_say(tmp_path: Path) -> None:
    """No text becomes a date, no chat a trace of an agent, and columns of several types keep each value."""
    file = tmp_path / "a.jsonl"
    dates = ["2020-01-01", "2020-01-01 00:00:00"]
    assert list(table(file, *({"text": date} for date in dates))["text"]) == dates
    chat = [{"role": "user", "content": "good"}]
    row = {"id": "1", "source": "x", "model": "m", "system_prompt": "p", "messages": chat}
    assert table(file, row)[0] == row
    values: list[Any] = [1, "x", {"z": 1}, None, [1, None], True, 0.5]
    assert list(table(file, *({"a": value, "b": 1} for value in values))["a"]) == values
    parts = [[{"content": "x"}], [{"content": [{"type": "text"}]}]]
    assert list(table(file, *({"messages": part} for part in parts))["messages"]) == parts
    assert list(table(file, {"a": 2**64 + 1}, {"a": 2**53 + 1})["a"]) == [str(2**64 + 1), 2**53 + 1]
    file.write_text('{"a": NaN, "b": 1}\n\n{"a": -Infinity, "c": "\u2028"}\n')
    assert list(read_file(str(file), "data.train")) == [
        {"a": None, "b": 1, "c": None},
        {"a": None, "b": None, "c": "\u2028"},
    ]
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2.5}')
    assert list(read_file(str(file), "data.train")) == [{"a": 1.0}, {"a": 2.5}]
    whole = tmp_path / "a.json"
    whole.write_text('{\n  "version": 2,\n  "data": [\n {"x": "y"}]\n}\n')
    assert list(read_file(str(whole), "data.train")) == [{"version": 2, "data": [{"x": "y"}]}]


@pytest.mark.parametrize(
    ("first", "then"), [(None, "x"), ([], [1.5]), ({"k": 1}, {"j": ["x"]}), (1, "x"), (1, 0.5), ("x", {"z": [1]})]
)
def test_a_type_that_shows_late_holds_for_all_rows(first: Any, then: Any, tmp_path: Path) -> None:
    """Rows are read a block at a time, and a file's first block does not tell its types."""
    rows: list[dict[str, Any]] = [{"a": first}] * 2_500 + [{"a": then, "b": 1}] * 2_000
    made = table(tmp_path / "a.jsonl", *rows)
    assert len(made) == 4_500 and made["b"][2_499] is None and made["b"][2_500] == 1
    keys = {**dict.fromkeys(first), **dict.fromkeys(then)} if isinstance(first, dict) else None
    wanted = [{**keys, **value} for value in (first, then)] if keys else [first, then]
    assert [made["a"][0], made["a"][2_500]] == wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        # Those that pyarrow's reader died of.
        ("a.json", '[null, {"a": "x"}, "%s", {"a": "y"}]', "row 1 is not a JSON object"),
        ("a.json", '[Infinity, {"a": {}}, {"a": "x"}]', "row 1 is not a JSON object"),
        ("a.jsonl", '{"a": 1}\nnull\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"a": "x"}\n{"a": "\\ud800"}\n', "line 2 has half of a surrogate pair"),
        ("a.jsonl", '{"a":' * 100_000, "line 1 is nested too deeply"),
        ("a.json", "[" * 100_000, "is nested too deeply"),
        ("a.json", "{}", "has no rows"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', "there is text after the end of the list"),
        ("a.json", '[{"a": "\\udc00"}]', "row 1 has half of a surrogate pair"),
        ("a.json", '{\n"a": [1,\n}', "broken JSON at line 3, column 1"),
        ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', r"byte 0xe9 in line 2 \(offset 18\)"),
    ],
)
def test_json_that_is_no_table_is_refused(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LitPeftError, match=said):
        read_file(str(file), "data.train")


@pytest.mark.parametrize("characters", [1, 5, 64, 2**20])
def test_a_list_is_read_bit_by_bit(characters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks off where a bit ends, rows and the places of errors are those of the json module."""
    monkeypatch.setattr(json_rows, "_CHARACTERS", characters)
    value = {"a": ['x,]\\"}{', "\U0001f600 é\u2028", -1.5e-7, True, None, {"b": [{}, []]}], "": " \n\t"}
    good = [value, {}, {"a": []}, value, {"z": "y" * 90}]
    file = tmp_path / "a.json"
    for text in (json.dumps(good), json.dumps(good, indent=3, ensure_ascii=False) + "\r\n ", "\n [ ] "):
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        if json.loads(text):
            assert [row for row, _ in json_rows.json_rows(file, "x")] == json.loads(text)
        else:
            with pytest.raises(LitPeftError, match="x has no rows"):
                list(json_rows.json_rows(file, "x"))
    whole = json.dumps([{"a": "x"}, {"b": ["y" * 30]}, {"c": 1.5}], indent=1)
    for at in range(1, len(whole)):
        for broken in (whole[:at], f"{whole[:at]}%{whole[at:]}"):
            file.write_text(broken)
            try:
                json.loads(broken)
                continue
            except json.JSONDecodeError as exc:
                place = f"line {exc.lineno}, column {exc.colno}: {exc.msg}"
            with pytest.raises(LitPeftError) as problem:
                list(json_rows.json_rows(file, "x"))
            assert place in str(problem.value), broken


def test_what_a_killed_process_left_goes(new_cache: Path, tmp_path: Path) -> None:
    """A table half written is seen by nobody, and goes with the next writing of that file."""
    file = tmp_path / "a.jsonl"
    table(file, {"a": 1})
    [made] = new_cache.rglob("*.arrow")
    left, running = (made.with_name(f".{made.name}.tmp-{name}") for name in ("0a", "0b"))
    for path in (left, running):
        path.write_bytes(made.read_bytes()[:40])
    os.utime(left, (1, 1))
    made.unlink()
    assert list(table(file, {"a": 1})) == [{"a": 1}]
    assert {path.name for path in made.parent.iterdir()} >= {made.name, running.name} and not left.exists()
    made.unlink()
    file.write_text('{"a": 1}\n{')
    with pytest.raises(LitPeftError):
        read_file(str(file), "data.train")
    assert not [path for path in new_cache.rglob(".*") if path != running]


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "text\ngood\n"), ("a.jsonl", '{"text": "good"}\n'), ("a.conll", "good O\n")]
)
def test_a_cache_that_cannot_be_written_is_reported(name: str, text: str, new_cache: Path, tmp_path: Path) -> None:
    new_cache.rmdir()
    new_cache.write_text("a file in the folder's place")
    (tmp_path / name).write_text(text)
    read = read_conll if name.endswith(".conll") else read_file
    with pytest.raises(LitPeftError, match=r"a\..*: Not a directory \(.*\); set LIT_PEFT_CACHE"):
        read(str(tmp_path / name), "data.train")


@pytest.mark.parametrize(("name", "text"), [("a.csv", "text\ngood\n"), ("a.jsonl", '{"text": "good"}\n')])
def test_a_full_disk_is_reported(name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.ipc.new_stream", full)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", full)
    (tmp_path / name).write_text(text)
    with pytest.raises(LitPeftError, match=r"a\..*: No space left on device \(cache\); set LIT_PEFT_CACHE"):
        read_file(str(tmp_path / name), "data.train")


def test_labels_of_one_file_missing_from_the_other(encoder: Path, tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,label\ngood film,pos\nbad film,neg\npoor film,meh\n")
    test.write_text("text,label\ngreat film,pos\n")
    made = data(encoder, train, test=str(test))
    made.setup("test")
    assert made.num_labels == 3  # a label that no test row has is no error
    test.write_text("text,label\ngreat film,pos\nawful film,bad\n")
    with pytest.raises(LitPeftError, match=r"data.test.*row 2: label 'bad' does not occur in training"):
        data(encoder, train, test=str(test)).setup("test")


@pytest.mark.parametrize("processes", [None, 2])
def test_a_changed_file_is_noticed(processes: int | None, encoder: Path, tmp_path: Path) -> None:
    """Its size and times are those of the file before, and the tokens are not."""
    file = tmp_path / "a.csv"
    times, tokens = [], []
    for word in ("good", "poor", "good"):
        file.write_text(f"text,label\n{word} film,0\nthe film,1\n")
        os.utime(file, ns=(10**18, 10**18))
        times.append((file.stat().st_size, file.stat().st_mtime_ns))
        made = data(encoder, file, num_proc=processes)
        assert made.examples("train")["input_ids"][0] == made.tokenizer(f"{word} film")["input_ids"]
        tokens.append(made.identity("train"))
    assert len(set(times)) == 1 and tokens[0] == tokens[2] != tokens[1]


def test_tokens_are_kept_for_the_next_run(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return encode_texts(*args, **kwargs)

    counted.__qualname__, counted.__module__ = "counted", "a module"
    monkeypatch.setattr("lit_peft.data.text_classification.encode_texts", counted)
    file, moved = tmp_path / "a.csv", tmp_path / "b.csv"
    for path in (file, moved):
        path.write_text("text,label\ngood film and so on,0\nthe film,1\n")
    other = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(encoder).save_pretrained(other)
    settings: list[tuple[Path, dict[str, Any], int]] = [
        (file, {"max_length": 16}, 1),
        (file, {"max_length": 16}, 1),
        (file, {"max_length": 9}, 2),
        (file, {"max_length": 16, "tokenizer": str(other)}, 2),  # it is the same, in another place
    ]
    for path, given, made in settings:
        data(encoder, path, **given).examples("train")
        assert len(calls) == made
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"awful"', '"awfull"'))
    data(encoder, file, max_length=16, tokenizer=str(other)).examples("train")
    assert len(calls) == 3


def test_cut_texts_are_counted(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"text,label\n{'good ' * 9},0\nbad,1\n")
    made = data(encoder, file, max_length=6)
    made.setup("fit")
    assert made.report() == ["data.train: 1 of 2 texts (50.0 %) cut to 6 tokens (data.max_length); 3 tokens lost."]


_MEASURE = """
import sys
from lit_peft import TextClassificationData
from lit_peft.util.memory import peak_memory
def data(file):
    made = TextClassificationData(base=sys.argv[1], train=file, validation_fraction=0.01, max_length=32)
    made.setup("fit")
    next(iter(made.train_dataloader()))
    return len(made.examples("train"))
data(sys.argv[2])
small = peak_memory()
count = data(sys.argv[3])
print(count, (peak_memory() - small) // 2**20)
"""


@pytest.mark.heavy
def test_many_rows_in_bounded_memory(encoder: Path, tmp_path: Path) -> None:
    """A tenth of issue 4's 300,000 rows, for the time; memory beyond a small file's is bounded by the file's size."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    for file, count in ((small, 100), (large, 30_000)):
        rows = ({"text": f"a good film {at} " + "the story is great " * 5, "label": at % 2} for at in range(count))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-c", _MEASURE, str(encoder), str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split()[-2:])
    assert count == 29_700
    assert grown < 120, f"{grown} MB more"


def test_every_process_gets_as_many_examples_and_none_counts_twice() -> None:
    def collate(examples: list[dict[str, int]]) -> dict[str, list[int]]:
        return {"at": [example["at"] for example in examples]}

    examples = [{"at": at} for at in range(5)]
    evened, real = EvenShards(examples, 4), DropSurplus(collate)
    shares = [[evened[at] for at in range(process, len(evened), 4)] for process in range(4)]
    assert [len(share) for share in shares] == [2, 2, 2, 2]
    batches = [real(share[at : at + 1]) for share in shares for at in range(2)]
    assert sorted(batch["at"][0] for batch in batches if "surplus" not in batch) == [0, 1, 2, 3, 4]
    assert real([evened[4], evened[5]]) == {"at": [4]}


def test_texts_of_a_parquet_file_that_are_not_utf8(tmp_path: Path) -> None:
    """What is damaged in the names of its columns and in its texts, each found by fuzzing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"caption": ["a film", "a plot"]}), file, compression="none", use_dictionary=False)
    whole = file.read_bytes()
    texts = whole.replace(b"a plot", b"a pl\xe9t")
    names = whole.replace(b"caption", b"capt\xe9on")
    assert whole not in (texts, names)
    for content, words in ((texts, "'caption'.*not UTF-8"), (names, "damaged.parquet")):
        file.write_bytes(content)
        with pytest.raises(LitPeftError, match=words):
            column_values(read_file(str(file), "data.train"), "caption")
