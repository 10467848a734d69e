"""The command says what the data lost: cuts, dropped rows, duplicates and overlap, with counts and shares."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_peft import CausalLMData, InstructionData, LitPeftError, Seq2SeqData, TokenClassificationData
from lit_peft.cli import main
from lit_peft.data.notes import Notes, suggest_limit

pytestmark = pytest.mark.usefixtures("new_cache")

CHAT = "{% for m in messages %}of {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}of {% endif %}"
# Rows by the number of words of the answer; the prompt has 3 tokens, "of the </s>", and "of" opens the answer.
ANSWERS = (2, 10, 30, 40)


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chat_file(file: Path) -> str:
    rows = []
    for words in ANSWERS:
        answer = {"role": "assistant", "content": " ".join(["good"] * words)}
        rows.append({"messages": [{"role": "user", "content": "the"}, answer]})
    return write(file, *rows)


def command(base: Path, folder: Path, stage: str, **data: Any) -> list[str]:
    given = ["--model", "LoRA", "--model.base", str(base), "--data", "InstructionData"]
    for name, value in {"messages_column": "messages", "chat_template": CHAT, "validation_fraction": 0, **data}.items():
        given += [f"--data.{name}", str(value)]
    options = ["--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    return [stage, *given, *options, *(["--trainer.max_steps", "1"] if stage == "fit" else [])]


def lost_at(limit: int) -> tuple[int, int]:
    """Tokens to learn that are cut, and all: an answer's words and its end, after 4 tokens."""
    return sum(min(words + 1, max(0, 4 + words + 1 - limit)) for words in ANSWERS), sum(w + 1 for w in ANSWERS)


def test_fit_says_what_was_cut_and_which_max_length_to_set(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    file = chat_file(tmp_path / "a.jsonl")
    lost, total = lost_at(20)
    assert (lost, total) == (15 + 25, 86) and max(ANSWERS) + 5 == 45
    line = "data.train: 40 of 86 tokens to learn (46.5 %) lost, because data.max_length is 20: "
    line += "set data.max_length to 45 to lose none."
    with pytest.warns(UserWarning, match=re.escape(line)):
        assert main(command(decoder, tmp_path, "fit", train=file, max_length=20)) == 0
    banner = [line.removeprefix("data:").strip() for line in capsys.readouterr().out.splitlines() if "data:" in line]
    cut = "data.train: 2 of 4 rows (50.0 %) cut to 20 tokens at the end (data.max_length); "
    assert [f"{cut}40 of 102 tokens (39.2 %) lost.", line] == banner[-2:]


@pytest.mark.parametrize("max_length", [42, 45])
def test_a_small_loss_is_no_warning(
    max_length: int, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    file = chat_file(tmp_path / "a.jsonl")
    assert main(command(decoder, tmp_path, "fit", train=file, max_length=max_length)) == 0
    said = capsys.readouterr()
    lost, total = lost_at(max_length)
    assert "tokens to learn" not in said.err
    expected = f"{lost} of {total} tokens to learn (3.5 %) lost, because data.max_length is {max_length}."
    assert (expected in said.out) == (lost > 0) == (max_length == 42)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_other_stages_say_it_too(
    stage: str, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    split = {"validate": "validation"}.get(stage, stage)
    file = chat_file(tmp_path / "a.jsonl")
    data = {split: file, "max_length": 3 if stage == "predict" else 20}
    output = [] if stage == "validate" else ["--output", str(tmp_path / "out.jsonl")]
    assert main(command(decoder, tmp_path, stage, **data) + output) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data:")]
    cut = (
        "4 of 4 rows (100.0 %) cut to 3 tokens at the start"
        if stage == "predict"
        else "2 of 4 rows (50.0 %) cut to 20 tokens at the end"
    )
    assert any(f"data.{split}: {cut} (data.max_length)" in line for line in lines)


def test_fit_says_which_rows_were_removed(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    rows = [{"text": f"{word} {other}"} for word in ("good", "bad", "great") for other in ("film", "story", "acting")]
    train, test = write(tmp_path / "a.jsonl", *rows, *rows[:2]), write(tmp_path / "b.jsonl", *rows[7:])
    call = ["fit", "--model", "LoRA", "--model.base", str(decoder), "--data", "CausalLMData", "--data.train", train]
    call += ["--data.test", test, "--data.validation_fraction", "0.3", "--trainer.max_steps", "1"]
    assert main([*call, "--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "data:      data.train: 2 of 11 rows (18.2 %) removed, because they also occur in validation or test." in out
    assert "data:      data.train: 2 of 9 rows (22.2 %) removed, because they are duplicates." in out


def test_the_suggested_limit_is_the_smallest_that_loses_one_percent() -> None:
    draw = random.Random(0)
    for _ in range(200):
        supervised = [draw.randint(1, 40) for _ in range(draw.randint(1, 9))]
        lengths = [count + draw.randint(0, 30) for count in supervised]
        limit = draw.randint(2, max(lengths))

        def share(at: int, lengths: list[int] = lengths, supervised: list[int] = supervised) -> float:
            # The answer is at the end of its row.
            pairs = zip(lengths, supervised, strict=True)
            return sum(min(count, max(0, length - at)) for length, count in pairs) / sum(supervised)

        expected = next(at for at in range(limit, max(lengths) + 1) if share(at) <= 0.01)
        assert suggest_limit(lengths, supervised, limit) == expected


def test_answers_that_are_dropped_count_as_lost(decoder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "bad " * 9, "completion": "good film"}, *[{"prompt": "bad", "completion": "good"}] * 3]
    file = write(tmp_path / "a.jsonl", *rows)
    data = CausalLMData(
        base=str(decoder), train=file, completion_column="completion", max_length=8, validation_fraction=0
    )
    with pytest.warns(
        UserWarning, match=r"3 of 9 tokens to learn \(33\.3 %\) lost.*set data\.max_length to 12 to lose"
    ):
        assert len(data.examples("train")) == 3
    assert (
        "data.train: 1 of 4 rows (25.0 %) dropped, because data.max_length 8 leaves nothing of their answers."
        in data.report()
    )
    everything = CausalLMData(
        base=str(decoder), train=file, completion_column="completion", max_length=12, validation_fraction=0
    )
    assert len(everything.examples("train")) == 4 and not [line for line in everything.report() if "lost" in line]


def test_a_loss_has_both_values_if_one_row_is_far_longer(decoder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "bad", "completion": "good " * count} for count in [20] * 200 + [60]]
    data = CausalLMData(
        base=str(decoder),
        train=write(tmp_path / "a.jsonl", *rows),
        completion_column="completion",
        max_length=12,
        validation_fraction=0,
    )
    with pytest.warns(UserWarning, match=r"set data.max_length to 22 to lose at most 1 %, or to 62 to lose none\."):
        data.setup("fit")


def test_targets_and_words_name_their_own_setting(decoder: Path, encoder: Path, tmp_path: Path) -> None:
    pairs = write(tmp_path / "a.jsonl", {"source": "a", "target": "good " * 9}, {"source": "bad", "target": "it"})
    data = Seq2SeqData(base=str(decoder), train=pairs, max_target_length=5, validation_fraction=0)
    with pytest.warns(
        UserWarning, match=r"5 of 12 tokens to learn .* lost.*set data\.max_target_length to 10 to lose none"
    ):
        data.setup("fit")
    words = write(tmp_path / "b.jsonl", {"tokens": ["good"] * 9, "tags": ["O", *["A"] * 8]})
    tags = TokenClassificationData(base=str(encoder), train=words, max_length=4, validation_fraction=0)
    with pytest.warns(
        UserWarning, match=r"5 of 9 words to learn \(55\.6 %\) lost.*set data\.max_length to 9 to lose none"
    ):
        tags.setup("fit")


def test_a_stream_warns_while_it_is_read(decoder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "this", "output": "good " * 90}] * 20
    data = InstructionData(
        base=str(decoder), train=write(tmp_path / "a.jsonl", *rows), streaming=True, max_length=64, batch_size=2
    )
    with pytest.warns(UserWarning, match=r"tokens to learn .* lost.*\(in one block of the stream\)"):
        next(iter(data.train_dataloader()))
    assert len([line for line in data.report() if "to learn" in line]) == 1


def test_a_line_is_kept_once_and_streams_differ_in_more_than_numbers() -> None:
    notes, stream = Notes(), Notes(streaming=True)
    for line in ("3 rows cut", "3 rows cut", "4 rows cut"):
        notes.add(line)
    with pytest.warns(UserWarning):
        for line in ("3 rows cut", "4 rows cut", "5 rows dropped"):
            stream.add(line)
    assert notes.lines() == ["3 rows cut", "4 rows cut"] and len(stream.lines()) == 2


def test_nothing_is_said_of_data_that_lost_nothing(decoder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"instruction": "this", "output": "film"})
    data = InstructionData(base=str(decoder), train=file, max_length=64, validation_fraction=0)
    data.setup("fit")
    assert data.report() == []
    with pytest.raises(LitPeftError, match=r"max_length is 8, and no prompt of data\.train leaves room"):
        InstructionData(base=str(decoder), train=file, max_length=8, validation_fraction=0).setup("fit")
