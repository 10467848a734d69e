"""Files that are large in an unusual way: very many columns, very long lines, texts of many megabytes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lit_peft import CausalLMData, LitPeftError, TextClassificationData
from lit_peft.data import long_texts
from lit_peft.data.conll import read_conll
from lit_peft.data.files import read_file
from lit_peft.data.long_texts import token_ids

COLUMNS = 100_000
WORDS = "the film was good and weak "


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("wide") / "wide.csv"
    names = ["text", *(f"column {number}" for number in range(COLUMNS - 2)), "label"]
    rows = [[f"a good film {row}", *["7"] * (COLUMNS - 2), "neg" if row % 2 else "pos"] for row in range(20)]
    file.write_text("".join(",".join(row) + "\n" for row in (names, *rows)))
    return file


@pytest.mark.parametrize("streaming", [False, True])
def test_the_unused_of_100_000_columns_are_not_read(
    streaming: bool, wide: Path, encoder: Path, new_cache: Path
) -> None:
    began = time.monotonic()
    more: dict[str, Any] = {"streaming": True, "validation_fraction": 0.0} if streaming else {}
    data = TextClassificationData(base=str(encoder), train=str(wide), labels=["neg", "pos"], batch_size=4, **more)
    data.setup("fit")
    labels = [label for batch in data.train_dataloader() for label in batch["labels"].tolist()]
    assert set(labels) == {0, 1} and len(labels) == (20 if streaming else 18)
    if not streaming:
        assert data.rows["train"].table.column_names == ["text", "label"]
    assert time.monotonic() - began < 10


def test_an_unknown_one_of_100_000_columns_is_still_answered_with_the_nearest(
    wide: Path, encoder: Path, new_cache: Path
) -> None:
    data = TextClassificationData(base=str(encoder), train=str(wide), text_column="colum 77")
    with pytest.raises(
        LitPeftError, match=r"no column 'colum 77' \(data.text_column\); it has .*'column 77'"
    ) as raised:
        data.setup("fit")
    assert len(str(raised.value)) < 500


def test_a_repeated_name_among_many_is_found_in_no_time(tmp_path: Path, new_cache: Path) -> None:
    file = tmp_path / "repeated.csv"
    file.write_text(",".join([*(f"c{number}" for number in range(COLUMNS)), "c7"]) + "\n")
    began = time.monotonic()
    with pytest.raises(LitPeftError, match=r"empty or repeated column names \(\['c7'\]\)"):
        read_file(str(file), "data.train")
    assert time.monotonic() - began < 3


def long_text(megabytes: int) -> str:
    return WORDS * (megabytes * 2**20 // len(WORDS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("long.txt", lambda text: f"a film\n{text}\nthe end"),
        ("long.jsonl", lambda text: "\n".join(json.dumps({"text": one}) for one in ("a film", text, "the end"))),
        ("long.csv", lambda text: f"text\n{text}\na film\nthe end\n"),
    ],
)
def test_a_row_of_20_mb_is_read(name: str, content: Any, tmp_path: Path, new_cache: Path) -> None:
    file, text = tmp_path / name, long_text(20)
    file.write_text(content(text))
    table = read_file(str(file), "data.train")
    assert sorted(len(row.strip()) for row in table["text"]) == [6, 7, len(text.strip())]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jsonl", lambda text: '{"text": "a"}\n{"text": "' + text + "\n", r"line 2 \(20,9\d\d,\d\d\d bytes; is a"),
        (
            "text.jsonl",
            lambda text: '{"text": "a"}\n' + text + "\n",
            r"line 2 \(20,9\d\d,\d\d\d bytes; is a line break",
        ),
        ("open.csv", lambda text: 'text\na\n"' + text + "\nthe end\n", "a quote opened in row 2 is never closed"),
        ("text.conll", lambda text: f"EU B\n{text}\n", r"line 2 has 20,9\d\d,\d\d\d characters"),
    ],
)
def test_a_broken_line_of_20_mb_is_one_error_without_its_text(
    name: str, content: Any, said: str, tmp_path: Path, new_cache: Path
) -> None:
    file = tmp_path / name
    file.write_text(content(long_text(20)))
    with pytest.raises(LitPeftError, match=said) as raised:
        (read_conll if name.endswith("conll") else read_file)(str(file), "data.train")
    assert len(str(raised.value)) < 300 and str(file) in str(raised.value) and "film" not in str(raised.value)


def test_a_text_too_long_for_one_example_is_an_error_with_its_length(
    encoder: Path, tmp_path: Path, new_cache: Path
) -> None:
    file = tmp_path / "long.csv"
    file.write_text(f"text,label\na film,pos\n{long_text(6)},neg\n")
    data = TextClassificationData(base=str(encoder), train=str(file), validation_fraction=0.0)
    with pytest.raises(LitPeftError, match=r"row 2: column 'text' has a text of 6,\d\d\d,\d\d\d characters"):
        data.setup("fit")


def test_a_long_text_for_a_language_model_is_tokenized_in_pieces(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(f"a film\n{WORDS * 200}\nthe end is good\n")

    def examples() -> Any:
        data = CausalLMData(base=str(decoder), train=str(file), validation_fraction=0.0, max_length=16)
        return list(data.examples("train"))

    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "whole"))
    whole = examples()
    monkeypatch.setattr(long_texts, "_PIECE", 100)
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "pieces"))
    assert examples() == whole and len(whole) > 70


@pytest.mark.parametrize("byte_level", [False, True])
def test_the_pieces_have_the_tokens_of_the_whole(byte_level: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = "The quick brown fox, jumps over\nthe lazy dog's back. It isn't 1234 the 5 end.\n" * 40
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel() if byte_level else pre_tokenizers.Metaspace()
    trainer: Any = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    backend.train_from_iterator([text], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    whole = tokenizer([text, "the fox"])["input_ids"]
    monkeypatch.setattr(long_texts, "_PIECE", 120)
    found = token_ids([text, "the fox"], tokenizer)
    assert found[1] == whole[1] and found[0][0] == 0 and found[0][-1] == 1
    if byte_level:
        # The tokenizer puts a space before each text that begins with none, and a line break is none.
        assert tokenizer.decode(found[0]).split() == tokenizer.decode(whole[0]).split()
        assert abs(len(found[0]) - len(whole[0])) < len(text) / 100
    else:
        assert found == whole
