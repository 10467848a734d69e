"""Prompts and their answers: nothing is cut, dropped or emptied silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_peft import CausalLMData, InstructionData, LitPeftError, Seq2SeqData

pytestmark = pytest.mark.usefixtures("new_cache")


def lines(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def letters() -> Any:
    """A tokenizer that knows five letters, drops all else, and has no token that ends a text."""
    backend = Tokenizer(models.BPE({letter: at for at, letter in enumerate("_abcde")}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="_", model_max_length=64)


def test_raw_prompts_that_are_cut_are_counted(decoder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "good " * 9 + "bad"}, {"text": "bad"})
    data = CausalLMData(base=str(decoder), predict=file, max_length=6)
    examples = data.examples("predict")
    bad = AutoTokenizer.from_pretrained(decoder)("bad")["input_ids"]
    assert [len(ids) for ids in examples["input_ids"]] == [6, 1] and examples["input_ids"][0][-1:] == bad
    assert examples.column_names == ["input_ids"]
    assert data.report() == ["data.predict: 1 of 2 prompts (50.0 %) cut to 6 tokens (data.max_length); 4 tokens lost."]


@pytest.mark.parametrize("make", [CausalLMData, InstructionData, Seq2SeqData])
def test_rows_with_nothing_to_learn_are_reported(make: Any, letters: Any, tmp_path: Path) -> None:
    columns = {
        CausalLMData: ("prompt", "completion", {"completion_column": "completion"}),
        InstructionData: ("instruction", "output", {}),
        Seq2SeqData: ("source", "target", {}),
    }
    given, wanted, settings = columns[make]
    rows = [{given: "a b", wanted: "c"}, {given: "a", wanted: "ZZ"}]
    data = make(train=lines(tmp_path / "a.jsonl", *rows), validation_fraction=0, **settings)
    data.tokenizer = letters
    with pytest.raises(LitPeftError, match=r"row 2 has no tokens to learn|'ZZ' has no tokens to learn"):
        data.examples("train")


@pytest.mark.parametrize("make", [CausalLMData, InstructionData, Seq2SeqData])
def test_a_tokenizer_without_an_end_is_a_warning(make: Any, letters: Any, decoder: Path, tmp_path: Path) -> None:
    row = {"text": "a b", "instruction": "a", "output": "b", "source": "a", "target": "b"}
    file = lines(tmp_path / "a.jsonl", row)
    data = make(train=file, validation_fraction=0)
    data.tokenizer = letters
    with pytest.warns(UserWarning, match=r"no end-of-text token \(eos_token\), so the model does not learn to stop"):
        data.setup("fit")
    data = make(base=str(decoder), train=file, validation_fraction=0)
    data.setup("fit")
    assert not [line for line in data.report() if "stop" in line]


def test_text_without_a_token_to_predict_is_reported(letters: Any, tmp_path: Path) -> None:
    data = CausalLMData(train=lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}), validation_fraction=0)
    data.tokenizer = letters
    with pytest.raises(LitPeftError, match=r"data\.train .* no row has two tokens"):
        data.examples("train")


def test_a_template_takes_any_column(letters: Any, tmp_path: Path) -> None:
    row = {"x": {"y": "a"}, "my b": "b", "number": 0, "none": None, "out": "c"}
    file = lines(tmp_path / "a.jsonl", {**row, "out": "c"}, {**row, "none": "d"})

    def prompts(template: str) -> list[str]:
        data = CausalLMData(predict=file, prompt_template=template, completion_column="out")
        data.tokenizer = AutoTokenizer.from_pretrained(decoder_of_digits(letters, tmp_path))
        return [data.tokenizer.decode(ids).replace(" ", "") for ids in data.examples("predict")["input_ids"]]

    assert prompts("{x.y}{my b}{none}") == ["ab", "abd"]
    # A number that is 0 is no empty cell.
    assert prompts("{number}a") == ["0a", "0a"]
    with pytest.raises(LitPeftError, match="does not fit"):
        prompts("{x.y:d}")
    data = CausalLMData(predict=file, prompt_column="x", completion_column="out")
    with pytest.raises(LitPeftError, match=r"row 1: column 'x' has"):
        data.examples("predict")


def decoder_of_digits(letters: Any, folder: Path) -> Path:
    """The same tokenizer with a digit."""
    letters.add_tokens(["0"])
    letters.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_an_input_that_is_a_number_stays(decoder: Path, tmp_path: Path) -> None:
    from lit_peft.data.instruction import encode_instructions

    seen: list[str] = []

    def tokenizer(texts: list[str], **_: Any) -> Any:
        seen.extend(texts)
        return {"input_ids": [[7] for _ in texts]}

    tokenizer.eos_token_id = tokenizer.bos_token_id = tokenizer.sep_token_id = None  # type: ignore[attr-defined]
    encode_instructions(
        {"a": ["what", "what"], "b": [0, None]},
        tokenizer=tokenizer,
        instruction_column="a",
        input_column="b",
        output_column="c",
        template="alpaca",
        system_column="s",
        history_column="h",
        prompts_only=True,
        max_length=8,
        train_on_inputs=False,
    )
    assert "### Input:\n0\n" in seen[0] and "### Input" not in seen[1]
