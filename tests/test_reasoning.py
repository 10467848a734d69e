"""Instruction tuning, LLM-Adapters' benchmarks, and what `test` and `predict` write."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lit_peft.callbacks import PredictionWriter
from models import QUIET

import lit_peft
from lit_peft import InstructionData, LitPeftError, ReasoningData
from lit_peft.data.prompt_templates import fill_template
from lit_peft.tasks.answers import extract_answer, find_benchmark, kind_of, same_answer

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("reference_answers", ROOT / "benchmarks" / "reference_answers.py")
assert _spec is not None and _spec.loader is not None
reference_answers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_answers)

OPTIONS: dict[str, Any] = {**QUIET, "enable_checkpointing": False}
CHAT = (
    "{% for m in messages %}of {{ m.role }} {{ m.content }} it {% endfor %}"
    "{% if add_generation_prompt %}of assistant {% endif %}"
)


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text(json.dumps(rows))
    return str(file)


def questions(count: int = 6) -> list[dict[str, Any]]:
    moods = ("good", "bad", "great", "poor", "weak", "awful")
    return [
        {
            "instruction": f"the film is {moods[at]}",
            "input": "",
            "output": f"\nA: The answer is {at}.",
            "answer": f"{at}.0",
        }
        for at in range(count)
    ]


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("\nA: 7 - 3 = 4 crayons. The answer is 4.", "number", "4"),
        ("The answer is 4. He had 7 before.", "number", "4"),
        ("The answer is 62 - 39 = 23. ", "number", "23"),
        ("The answer is -$293.", "number", "-293"),
        ("The answer is $11,728.50.", "number", "11728.5"),
        ("He has 3 apples, 4,5 or 6", "number", "6"),
        ("It is 10-3", "number", "3"),
        ("the answer is 3/4 of it", "number", "0.75"),
        ("The answer is 4.\n\n### Instruction:\nThe answer is 9.", "number", "4"),
        ("no idea", "number", None),
        ("The answer is $118 000.", "number", "118000"),
        ("The answer is $9 500.", "number", "9500"),
        ("The answer is 1 1/2 cups", "number", "1.5"),
        ("It is 1 200", "number", "200"),
        ("48/2 = <<48/2=24>>24\n#### 1,072", "number", "1072"),
        ("The answer to the question is 7. Not 8.", "number", "7"),
        ("**Answer**: 7, not 8", "number", "7"),
        ("The answer is −3.", "number", "-3"),
        ("The answer is -3/4.", "number", "-0.75"),
        ("A: 3 * 5 = 15.", "letter", None),
        ("A", "letter", "A"),
        ("C. 15", "letter", "C"),
        ("The correct option is B, as A is 3.", "letter", "B"),
        ("Because each of them is 2. The answer is (D).", "letter", "D"),
        ("A: Each is 3, so (C)", "letter", "C"),
        ("B", "letter", "B"),
        ("Because", "letter", None),
        ("the correct answer is True", "truth", "true"),
        ("the correct answer is answer 2", "answer", "answer2"),
        ("not answer1; the correct answer is answer3", "answer", "answer3"),
        ("answer1/answer2/answer3", "answer", None),
        ("answer12", "answer", None),
        ("ending4", "ending", "ending4"),
    ],
)
def test_extraction(text: str, kind: str, answer: str | None) -> None:
    assert extract_answer(text, kind) == answer


def test_benchmarks_by_name_and_forms_of_gold() -> None:
    assert [find_benchmark(name) for name in ("GSM8K", "ARC-Easy", "social_i_qa", "WinoGrande")] == [
        "gsm8k",
        "arc-e",
        "siqa",
        "winogrande",
    ]
    with pytest.raises(LitPeftError, match="'boolq'"):
        find_benchmark("bolq")
    golds = ["-3.50", ["4"], "C", "false", "option2", "well", "1 + 1 = 2\n#### 2", 3]
    kinds = ["number", "number", "letter", "truth", "option", None, "number", "number"]
    assert [kind_of(gold) for gold in golds] == kinds
    assert same_answer("2", golds[-2], "number")
    assert same_answer("0.3335", "0.333", "number") and not same_answer("0.335", "0.333", "number")


def test_reference_outputs_are_sorted_by_reason() -> None:
    cases = [
        ("A: The answer is 4.", "5", "other"),
        ("A: 4 + 1 = 5, less 1. The answer is 4.", "5.0", "step"),
        ("The answer is -5.", "5", "sign"),
        ("The answer is 500.", "5", "power"),
        ("The answer is 1004.", "1,000", "close"),
        ("The answer is 4 + 5 = 9.", "5", "part"),
        ("The answer is 4 cats and 3 dogs.", "7", "several"),
        ("A: 2 cats. The answer is unknown.", "5", "wordless"),
        ("A: He has 4 cats.", "5", "open"),
        (" ", "5", "empty"),
        ("The answer is (B).", "C", "letter"),
        ("The answer is 5.", "5", None),
    ]
    for output, gold, key in cases:
        found = reference_answers.differing([{"output": output, "answer": gold}])
        assert list(found) == ([] if key is None else [key]), (output, gold)


@pytest.mark.skipif("LIT_PEFT_LLM_ADAPTERS" not in os.environ, reason="LIT_PEFT_LLM_ADAPTERS names no folder of files")
def test_reference_outputs_of_the_real_files_are_listed() -> None:
    page = (ROOT / "docs" / "reasoning.md").read_text("utf-8")
    listed = page.partition(reference_answers.START)[2].partition(reference_answers.END)[0]
    assert reference_answers.listing(Path(os.environ["LIT_PEFT_LLM_ADAPTERS"])) == listed.strip()


def test_template_is_alpacas() -> None:
    assert fill_template("Do it.").endswith("completes the request.\n\n### Instruction:\nDo it.\n\n### Response:\n")
    assert "further context. Write" in fill_template("Do it.", "this")
    assert fill_template("Do it.", "this").endswith("Do it.\n\n### Input:\nthis\n\n### Response:\n")
    theirs = fill_template("Do it.", template="llm_adapters").splitlines()
    assert theirs[2:4] == [" " * 16 + "### Instruction:", " " * 16 + "Do it."] and theirs[-1] == " " * 16


def test_alpaca_supervises_answers_and_counts_what_is_cut(decoder: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": "good", "output": "the film was well"},
        {"instruction": "bad", "output": "the film was"},
        {"instruction": "bad " * 20, "output": "awful"},
    ]
    prompt = len(InstructionData(base=str(decoder)).tokenizer(fill_template("good"))["input_ids"])
    data = InstructionData(
        base=str(decoder), train=write(tmp_path / "a.json", rows), max_length=prompt + 4, validation_fraction=0
    )
    examples = data.examples("train")
    texts = [
        data.tokenizer.decode([i for i, label in zip(e["input_ids"], e["labels"], strict=True) if label != -100])
        for e in examples
    ]
    assert texts == ["the film was well", "the film was</s>"] or texts == ["the film was well", "the film was </s>"]
    assert any(
        "1 of 2 rows (50.0 %) cut" in line and re.search(r"; 1 of \d+ tokens \(.* %\) lost", line)
        for line in data.report()
    )
    assert any("1 of 3 rows (33.3 %) dropped" in line for line in data.report())


def test_chats_supervise_the_assistant_alone(decoder: Path, tmp_path: Path) -> None:
    turns = [("user", "the film"), ("assistant", "is good"), ("user", "this story"), ("assistant", "was bad")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = write(tmp_path / "a.json", [{"messages": messages}])
    options: dict[str, Any] = {"base": str(decoder), "messages_column": "messages", "validation_fraction": 0}
    with pytest.raises(LitPeftError, match="chat template"):
        InstructionData(train=file, **options).examples("train")
    data = InstructionData(train=file, predict=file, chat_template=CHAT, **options)
    example = data.examples("train")[0]
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    kept = [data.tokenizer.decode([token]) for token, label in pairs if label != -100]
    assert kept == ["is", "good", "it", "was", "bad", "it"]
    prompt = data.tokenizer.decode(data.examples("predict")[0]["input_ids"])
    assert "this story" in prompt and "was bad" not in prompt
    file = write(tmp_path / "b.json", [{"messages": messages[:1]}])
    with pytest.raises(LitPeftError, match=r"row 1.*no assistant"):
        InstructionData(train=file, chat_template=CHAT, **options).examples("train")


def test_a_reasoning_set_is_tested_by_generation(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "AddSub.json", questions())
    data = ReasoningData(
        base=str(decoder), benchmark="AddSub", test=file, batch_size=4, max_new_tokens=3, max_length=64
    )
    module = lit_peft.LoRA(base=str(decoder))
    writer = PredictionWriter(str(tmp_path / "out.jsonl"))
    trainer = pl.Trainer(callbacks=[writer], **OPTIONS)
    decode = data.tokenizer.batch_decode

    def answers(ids: Any, **settings: Any) -> list[str]:
        # The tiny tokenizer has no digits, so answers are put in place of what was generated.
        return [f"The answer is {at % 3}." for at in range(len(ids))] if ids.shape[1] == 3 else decode(ids, **settings)

    monkeypatch.setattr(data.tokenizer, "batch_decode", answers)
    result = trainer.test(module, data, verbose=False)[0]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert list(result) == ["test_answer_accuracy"]
    assert [row["row"] for row in rows] == list(range(6)) and [row["gold"] for row in rows][:2] == ["0.0", "1.0"]
    assert [row["answer"] for row in rows] == ["0", "1", "2", "0", "0", "1"]
    assert result["test_answer_accuracy"] == pytest.approx(3 / 6)
    assert [row["correct"] for row in rows] == [True, True, True, False, False, False]
    assert (
        set(rows[0]) == {"row", "prompt", "text", "answer", "gold", "correct"} and "film is good" in rows[0]["prompt"]
    )


def test_mawps_own_form_trains_and_wrong_gold_is_an_error(decoder: Path, tmp_path: Path) -> None:
    own = [{"original_text": f"film {word}", "ans": at / 2} for at, word in enumerate(("good", "bad"))]
    data = ReasoningData(
        base=str(decoder), benchmark="mawps", train=write(tmp_path / "m.json", own), validation_fraction=0
    )
    assert len(data.examples("train")) == 2 and data.rows["train"].table["answer"][1] == "0.5"
    wrong = write(tmp_path / "w.json", questions(2))
    with pytest.raises(LitPeftError, match=r"row 1: '0.0' .* not an answer of boolq"):
        ReasoningData(base=str(decoder), benchmark="boolq", test=wrong).examples("test")


def test_prediction_goes_on_after_a_kill(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.jsonl"

    def predict(fail_at: int | None, limit: int = 5) -> list[int]:
        ran: list[int] = []

        class Module(lit_peft.LoRA):  # type: ignore[misc,name-defined]
            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                ran.append(len(batch["input_ids"]))
                if len(ran) == fail_at:
                    raise KeyboardInterrupt
                return super().predict_step(batch, batch_idx)

        pl.seed_everything(0)
        module = Module(base=str(decoder), generation={"max_new_tokens": limit})
        data = lit_peft.CausalLMData(base=str(decoder), predict=str(reviews), batch_size=10)
        trainer = pl.Trainer(callbacks=[PredictionWriter(str(out))], **OPTIONS)
        trainer.predict(module, data, return_predictions=False)
        return ran

    assert sum(predict(None)) == 96
    whole = out.read_text()
    out.unlink()
    with pytest.raises(BaseException):  # noqa: B017  Lightning exits on an interrupt
        predict(4)
    partial = next(tmp_path.glob(".predictions.jsonl.partial-*"))
    with partial.open("a") as file:
        file.write('{"row": 30, "pro')  # as a kill leaves it
    assert not out.exists()
    assert sum(predict(None)) == 66
    assert out.read_text() == whole and not list(tmp_path.glob(".pred*"))
    with pytest.raises(BaseException):  # noqa: B017
        predict(4)
    assert sum(predict(None, limit=4)) == 96  # other settings: from the start
