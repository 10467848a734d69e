"""TextClassificationData on a CSV written here, with a word-level tokenizer made here."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_peft import LitPeftError
from lit_peft.data.text_classification import TextClassificationData


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "very", *map(str, range(40))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64)
    made.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(path: Path) -> str:
    rows = [f'"{word} film, very\n{i}",{word}' for i in range(20) for word in ("good", "bad")]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return str(path)


def test_batches(tmp_path: Path, tokenizer: str) -> None:
    data = TextClassificationData(train=write(tmp_path / "a.csv"), tokenizer=tokenizer, batch_size=4, max_length=16)
    data.setup("fit")
    assert data.label_names == ["bad", "good"] and data.num_labels == 2
    first = [batch["input_ids"].tolist() for batch in data.train_dataloader()]
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [int(row[0] == 2) for row in batch["input_ids"].tolist()]
    again = TextClassificationData(train=write(tmp_path / "a.csv"), tokenizer=tokenizer, batch_size=4, max_length=16)
    again.setup("fit")
    assert first == [batch["input_ids"].tolist() for batch in again.train_dataloader()]


def test_missing_column_names_what_is_there(tmp_path: Path, tokenizer: str) -> None:
    data = TextClassificationData(train=write(tmp_path / "a.csv"), tokenizer=tokenizer, text_column="txt")
    with pytest.raises(LitPeftError, match="'text'"):
        data.setup("fit")
