"""A small file of each of LLM-Adapters' benchmarks, in the form of its own files, tested end to end by the command."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from lit_peft import InstructionData, LitPeftError, ReasoningData
from lit_peft.cli import main
from lit_peft.tasks.answers import gold_text

pytestmark = pytest.mark.usefixtures("new_cache")
MATH = "There are 7 crayons in the drawer . Mary took 3 . How many are there now ?"
CHOOSE = "Please choose the correct answer to the question: Why is the film good?\n\n{}"
SAY = "the correct answer is "
# Benchmark -> instruction, gold answers, a text that says the first of them, and one that says another.
FILES: dict[str, tuple[str, list[Any], str, str]] = {
    "gsm8k": (MATH, ["18.0", "3"], "She has 9 * 2 = 18. The answer is $18.00.", "The answer is 3."),
    "aqua": (MATH + " Answer Choices: (A) 3 (B) 4", ["B", "A"], "A: 7 - 3 = 4.The answer is (B).", "(A)"),
    "svamp": (MATH, [8.0, 2.5], "The answer is 8.", "About 2.5 or so."),
    "MAWPS": (MATH, ["4.0", "1,200"], "7 - 3 = 4", "The answer is 1200."),
    "AddSub": (MATH, [4, 12], "The answer is 4 crayons. He had 12 before.", "12"),
    "MultiArith": (MATH, [["64"], ["-3"]], "The answer is 64.", "The answer is -3."),
    "SingleEq": (MATH, ["0.25", "5"], "The answer is 1/4 of it.", "5"),
    "boolq": (CHOOSE.format("true or false"), ["true", "false"], "True.", "no, false"),
    "piqa": (
        CHOOSE.format("Solution1: a\n\nSolution2: b"),
        ["solution1", "solution2"],
        SAY + "solution1",
        "Solution 2",
    ),
    "social_i_qa": (
        CHOOSE.format("Answer1: a Answer2: b Answer3: c"),
        ["answer3", "answer1"],
        SAY + "answer3",
        "answer1",
    ),
    "hellaswag": (CHOOSE.format("Ending1: a\nEnding4: d"), ["ending4", "ending1"], SAY + "ending4", "Ending1"),
    "winogrande": (CHOOSE.format("Option1: a Option2: b"), ["option2", "option1"], SAY + "option2", "option1"),
    "ARC-Easy": (CHOOSE.format("Answer1: a Answer4: d"), ["answer4", "answer2"], "answer4", SAY + "answer2."),
    "ARC-Challenge": (CHOOSE.format("Answer1: a Answer5: e"), ["answer5", "answer2"], SAY + "Answer5", "answer2"),
    "openbookqa": (CHOOSE.format("Answer1: a Answer2: b"), ["answer1", "answer2"], SAY + "answer1", "answer2"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("named", [True, False])
def test_a_benchmark_is_tested(
    name: str, named: bool, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction, golds, first, second = FILES[name]
    rows = [{"instruction": instruction, "input": "", "output": "", "answer": gold} for gold in golds]
    (tmp_path / "test.json").write_text(json.dumps(rows * 2, indent=4))
    decode = transformers.PreTrainedTokenizerFast.batch_decode
    # The tiny tokenizer has no digits, so texts are put in place of what was generated.
    texts = [first, second, second, "none at all"]

    def said(self: Any, ids: Any, **settings: Any) -> Any:
        return texts if ids.shape[1] == 3 else decode(self, ids, **settings)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "batch_decode", said)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    command = ["test", "--model", "LoRA", "--model.base", str(decoder), "--data", "ReasoningData"]
    command += ["--data.test", "test.json", "--data.max_new_tokens", "3", "--data.max_length", "64"]
    command += ["--data.benchmark", name] if named else []
    command += ["--model.generation", '{"min_new_tokens": 3}', "--trainer.enable_progress_bar", "false"]
    assert main([*command, "--trainer.logger", "false", "--output", "out.jsonl"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == [0, 1, 2, 3]
    assert [row["correct"] for row in found] == [True, True, False, False]
    assert found[3]["answer"] is None


def test_a_file_that_mixes_benchmarks(decoder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": entry[0], "answer": entry[1][0]} for entry in FILES.values()]
    (tmp_path / "mixed.json").write_text(json.dumps([{**row, "answer": gold_text(row["answer"])} for row in rows]))
    data = ReasoningData(base=str(decoder), test=str(tmp_path / "mixed.json"), max_length=64)
    kinds = [data.examples("test")[at]["kind"] for at in range(len(rows))]
    assert kinds[0] == "number" and kinds[1] == "letter" and kinds[-1] == "answer" and len(set(kinds)) == 7
    # Gold answers as numbers and as texts in one column, as a handwritten file may have them.
    (tmp_path / "typed.json").write_text(json.dumps([rows[0], rows[4], rows[1]]))
    data = ReasoningData(base=str(decoder), test=str(tmp_path / "typed.json"), max_length=64)
    assert [re.sub(r"\.0$", "", row["gold"]) for row in data.examples("test")] == ["18", "4", "B"]


def test_gsm8ks_own_form(decoder: Path, tmp_path: Path) -> None:
    row = {"question": "the film is good", "answer": "Half is 48/2 = <<48/2=24>>24.\n#### 1,072"}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(row) + "\n")
    file = str(tmp_path / "gsm8k.jsonl")
    columns = {"instruction_column": "question", "output_column": "answer"}
    data = ReasoningData(base=str(decoder), benchmark="gsm8k", train=file, test=file, validation_fraction=0, **columns)
    data.drops_overlap = False
    assert data.examples("test")[0]["gold"] == "1,072" and len(data.examples("train")) == 1


OWN: dict[str, tuple[dict[str, Any], str, str, str | None]] = {
    "gsm8k": (
        {"question": "how many", "answer": "48/2 = <<48/2=24>>24.\n#### 1,072"},
        "how many",
        "1,072",
        "48/2 = <<48/2=24>>24.\n#### 1,072",
    ),
    "mawps": ({"id": 1, "original_text": "how many", "equation": "x=1", "ans": 1.5}, "how many", "1.5", None),
    "addsub": (
        {"iIndex": 1, "lEquations": ["X = 2"], "lSolutions": ["43"], "sQuestion": " how many "},
        "how many",
        "43",
        None,
    ),
    "multiarith": ({"lAlignments": [80], "lSolutions": [39.0], "sQuestion": "how many"}, "how many", "39.0", None),
    "svamp": (
        {"ID": "c", "Body": "It was 76", "Question": "How many?", "Equation": "(1)", "Answer": 51.0, "Type": "S"},
        "It was 76. How many?",
        "51.0",
        None,
    ),
    "aqua": (
        {"question": "how many", "options": ["A)5(x + 1)", "B)None of these"], "rationale": "it is", "correct": "B"},
        "how many Answer Choices: (A) 5(x + 1) (B) None of these",
        "B",
        None,
    ),
    "singleeq": (
        {"question": "how many", "chain-of-thought": "\nA: The answer is 43.", "pred": 43.0, "answer": 43.0},
        "how many",
        "43.0",
        "\nA: The answer is 43.",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_benchmarks_own_file_is_read(name: str, decoder: Path, tmp_path: Path) -> None:
    row, question, gold, working = OWN[name]
    (tmp_path / "a.json").write_text(json.dumps([row]))
    file = str(tmp_path / "a.json")
    for benchmark in (name, None):
        data = ReasoningData(
            base=str(decoder), benchmark=benchmark, train=file, test=file, predict=file, validation_fraction=0
        )
        data.drops_overlap = False
        assert (
            data.examples("test")[0]["gold"] == gold
            and len(data.examples("train")) == len(data.examples("predict")) == 1
        )
        table = data.rows["train"].table
        assert table["instruction"][0] == question and table[0].get("output") == working
        assert set(row) - {*table.column_names} <= {
            "question",
            "Question",
            "sQuestion",
            "original_text",
            "answer",
            "ans",
            "lSolutions",
            "Answer",
            "correct",
            "chain-of-thought",
        }


def test_questions_in_several_parts_need_their_columns_named(decoder: Path, tmp_path: Path) -> None:
    """The hub's BoolQ, without its passage, would be another benchmark."""
    (tmp_path / "a.json").write_text(json.dumps([{"question": "is it", "passage": "it is", "answer": True}]))
    with pytest.raises(LitPeftError, match="no column 'instruction'"):
        ReasoningData(base=str(decoder), test=str(tmp_path / "a.json")).setup("test")


def test_chats_without_their_column_named_need_a_chat_template(decoder: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "film"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "messages": chat}) + "\n")
    for streaming in (False, True):
        file = str(tmp_path / "a.jsonl")
        data = InstructionData(base=str(decoder), train=file, streaming=streaming, validation_fraction=0)
        with pytest.raises(LitPeftError, match=r"has chats \(column 'messages'\), but .* has no chat template"):
            data.setup("fit")
