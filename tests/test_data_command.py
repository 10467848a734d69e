"""`lit-peft data`: examples with what is learned marked, and figures that are counted here again."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_peft.cli import main

pytestmark = pytest.mark.usefixtures("new_cache")
CHAT = (
    "{% for m in messages %}of {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}of assistant {% endif %}"
)


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bare(decoder: Path, encoder: Path, tmp_path: Path) -> dict[str, str]:
    """Bases without weights, which are never read."""
    found = {}
    for name, folder in {"decoder": decoder, "encoder": encoder}.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        found[name] = str(tmp_path / name)
    return found


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


CHATS = [
    {"messages": [{"role": "user", "content": "the film"}, {"role": "assistant", "content": word}]}
    for word in ("is good", "is bad", "was well", "was poor", "was weak")
]
PLAIN = ["--data.validation_fraction", "0", "--data.max_length", "32"]


@pytest.mark.parametrize("streaming", [[], ["--data.streaming", "true", "--data.shuffle_buffer", "1"]])
def test_a_chat_is_shown_with_its_answer_marked(
    streaming: list[str], bare: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(tmp_path / "a.jsonl", CHATS)
    given = ["--data", "InstructionData", "--data.train", file, "--data.chat_template", CHAT, *PLAIN, *streaming]
    out = show(capsys, "--base", bare["decoder"], "--examples", "5", *given)
    assert len(re.findall(r"\[\[ ?(is good|is bad|was well|was poor|was weak) ?</s>\]\]", out)) == 5
    assert out.count("[UNK] the film </s>") == 5 and "\033" not in out
    # "of user the film </s> of assistant is good </s>" has 10 tokens, and 3 of them are learned.
    assert "50 tokens, 15 of them learned (30.0 %)" in out and "longest 10 (max_length 32)" in out
    assert "packed: 2 rows of 32 tokens, 78.1 % full" in out
    assert "data.train: chats (column 'messages'), rendered by the tokenizer's chat template." in out
    assert "its first 5 examples" in out if streaming else "5 rows, 5 examples, 0 duplicates" in out


def test_a_terminal_gets_colors_and_no_escape_of_the_data(
    bare: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(
        tmp_path / "a.jsonl", [{"text": "good \033[31m film", "label": "\033[1m x"}, {"text": "a", "label": "b"}]
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    given = ["--data", "TextClassificationData", "--data.train", file, *PLAIN]
    out = show(capsys, "--base", bare["encoder"], *given)
    assert "\033[30;42m\\x1b[1m x\033[0m" in out and "in color" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[\\x1b[1m x]]" in show(capsys, "--base", bare["encoder"], *given)


def test_the_page_is_self_contained_and_escaped(
    bare: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "good film", "label": "<script>alert(1)</script>"}, {"text": "bad", "label": "b"}]
    file = lines(tmp_path / "a.jsonl", rows)
    given = ["--data", "TextClassificationData", "--data.train", file, *PLAIN, "--output", "page.html"]
    show(capsys, "--base", bare["encoder"], *given)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in page
    assert "<script" not in page and "http" not in page and "src=" not in page
    assert "<li>labels: " in page


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "rows", "settings", "expected"),
    [
        ("CausalLMData", [{"text": "the film was good"}], [], ["[[the film was good"]),
        (
            "TextClassificationData",
            [{"text": "the film", "label": "pos"}, {"text": "a story", "label": "neg"}],
            ["--data.labels", "[neg, pos, other]"],
            ["the film\n→ [[pos]]", "neg 1 (50.0 %)", "pos 1 (50.0 %)", "other 0 (0.0 %)"],
        ),
        (
            "TokenClassificationData",
            [{"tokens": ["the", "film"], "tags": ["O", "B-X"]}],
            ["--data.labels", "[O, B-X]"],
            ["[[the/O]][[ film/B-X]]"],
        ),
        (
            "QuestionAnsweringData",
            [{"question": "what is good", "context": "the film is good", "answers": "film"}],
            ["--data.doc_stride", "2", "--data.max_question_length", "8"],
            ["the[[ film]]"],
        ),
        (
            "MultipleChoiceData",
            [{"question": "it is", "choices": ["good", "bad"], "answer": 1}],
            [],
            ["(0) it is", "(1) [["],
        ),
        ("Seq2SeqData", [{"source": "the film", "target": "a story"}], [], ["→ [[a story"]),
        (
            "RewardData",
            [{"prompt": "the film", "chosen": "good", "rejected": "bad"}],
            [],
            ["(0) [[the film good", "(1) the film bad", " 1 examples", "longest 4"],
        ),
        (
            "PreferenceData",
            [{"prompt": "the film", "chosen": "good", "rejected": "bad"}],
            [],
            ["(0) the film[[ good", "(1) the film[[ bad", " 1 examples", "longest 4"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_data_module_is_shown(
    kind: str,
    rows: list[dict[str, Any]],
    settings: list[str],
    expected: list[str],
    streaming: bool,
    bare: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = bare["decoder" if kind in ("CausalLMData", "Seq2SeqData") else "encoder"]
    file = lines(tmp_path / "a.jsonl", rows)
    given = ["--data", kind, "--data.train", file, *PLAIN, *settings, "--data.streaming", str(streaming).lower()]
    out = show(capsys, "--base", base, *given)
    assert not [text for text in expected if text not in out], out


def test_it_takes_the_configuration_of_fit_and_counts_duplicates(
    bare: dict[str, str], reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = reviews.read_text(encoding="utf-8").splitlines()
    (tmp_path / "twice.csv").write_text("\n".join([*rows, *rows[1:11]]), encoding="utf-8")
    (tmp_path / "c.yaml").write_text(
        f"model:\n  class_path: LoRA\n  init_args: {{base: '{bare['encoder']}', task: sequence_classification}}\n"
        "data:\n  class_path: TextClassificationData\n"
        "  init_args: {train: twice.csv, validation: twice.csv, test_fraction: 0.0, max_length: 32}\n"
        "trainer: {max_steps: 3}\n"
    )
    (tmp_path / "other.csv").write_text("text,label\nwell well,pos\nweak,neg\n", encoding="utf-8")
    out = show(capsys, "--config", "c.yaml", "--data.validation", "other.csv", "--split", "validation")
    assert "example 2 of validation" in out and "validation:\n  2 rows, 2 examples, 0 duplicates" in out
    out = show(capsys, "--config", "c.yaml", "--data.validation", "null", "--data.validation_fraction", "0")
    assert "106 rows, 106 examples, 10 duplicates" in out
    assert not (tmp_path / "lit_peft_runs").exists()


def test_wrong_input_is_reported(bare: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "a.jsonl", CHATS)
    given = ["--base", bare["decoder"], "--data", "InstructionData", "--data.train", file, *PLAIN]
    for more, words in {
        ("--split", "tset", "--data.chat_template", CHAT): "--split tset is not in the data: use one of train",
        ("--examples", "0"): "--examples 0",
        ("--data.learns", "answers"): "'learns' is not a setting",
        (): "no chat template",
    }.items():
        assert main(["data", *given, *more]) == 2
        assert words in capsys.readouterr().err
