"""`lit-peft doctor` and `lit-peft init`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from speech_example import save_whisper
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from vision_models import model_of

from lit_peft.cli import main
from lit_peft.commands import doctor, init
from lit_peft.tasks import TASKS


def test_memory_counts_the_models_own_parameters(decoder: Path) -> None:
    base = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(decoder).parameters())
    full = doctor.training_memory(str(decoder), "FullFineTuning", "causal_lm", 2, 16)
    assert [full["parameters"], full["gradients"], full["Adam's moments"]] == [4 * base, 4 * base, 8 * base]
    lora = doctor.training_memory(str(decoder), "LoRA", "causal_lm", 2, 16)
    extra = lora["parameters"] - 4 * base
    assert lora["gradients"] == extra > 0 and lora["Adam's moments"] == 2 * extra
    # 34 s b h + 5 a s^2 b bytes for each layer in half precision; twice in single.
    assert lora["activations, about"] == 2 * 2 * (34 * 16 * 2 * 32 + 5 * 4 * 16**2 * 2)


def test_doctor_says_what_is_missing_and_what_fits(
    decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_OPTIONAL", {"no_such_package": ("nothing", "pip install it")})
    monkeypatch.setattr(doctor, "free_memory", lambda: {"large": 2**40, "small": 1})
    assert main(["doctor", "--base", str(decoder)]) == 0
    said = capsys.readouterr().out
    assert "missing  (nothing)  ->  pip install it" in said
    assert "fits" in said.partition("  large")[2].splitlines()[0]
    assert "does not fit" in said.rpartition("  small")[2]
    assert main(["doctor", "--method", "Lora"]) == 2
    for option in ("batch_size", "length"):
        assert main(["doctor", "--base", str(decoder), f"--{option}", "0"]) == 2
        assert f"--{option} 0" in capsys.readouterr().err


def test_what_init_writes_runs(
    encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    flags = ["--task", "sequence_classification", "--base", str(encoder), "--method", "LoRA", "--data", str(reviews)]
    assert main(["init", *flags]) == 0
    assert main(["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]) == 0
    before = Path("config.yaml").read_bytes()
    capsys.readouterr()
    assert main(["init", *flags]) == 2
    assert "exists" in capsys.readouterr().err and Path("config.yaml").read_bytes() == before
    for change, word in ((["--data", "none.csv"], "'none.csv'"), (["--method", "Lora"], "'LoRA'")):
        assert main(["init", *flags, *change, "--output", "other.yaml"]) == 2
        assert word in capsys.readouterr().err and not Path("other.yaml").exists()


PAIRS = list(itertools.product(("film", "story", "acting", "it"), ("good", "bad", "poor", "great")))
FILES = {
    "causal_lm": ("texts.jsonl", "CausalLMData", [{"text": f"the {noun} was {word}"} for noun, word in PAIRS]),
    "completions": (
        "pairs.jsonl",
        "completion_column",
        [{"prompt": f"the {noun} of {word} is", "completion": word} for noun, word in PAIRS],
    ),
    "instructions": (
        "alpaca.json",
        "InstructionData",
        [{"instruction": f"the {noun}", "input": word, "output": word} for noun, word in PAIRS],
    ),
    "chats": (
        "chats.jsonl",
        "messages_column",
        [
            {"messages": [{"role": "user", "content": noun}, {"role": "assistant", "content": word}]}
            for noun, word in PAIRS
        ],
    ),
    "seq2seq": (
        "pairs.jsonl",
        "Seq2SeqData",
        [{"source": f"the {noun} is {word}", "target": word} for noun, word in PAIRS],
    ),
    "token_classification": (
        "tags.conll",
        "TokenClassificationData",
        "\n\n".join(f"the O\n{noun} B-X\nis O\n{word} O" for noun, word in PAIRS),
    ),
    "question_answering": (
        "squad.jsonl",
        "QuestionAnsweringData",
        [
            {"question": f"the {noun} is {word}", "context": f"the {noun} is {word}", "answers": noun}
            for noun, word in PAIRS
        ],
    ),
    "preference": (
        "pairs.jsonl",
        "PreferenceData",
        [{"prompt": f"the {noun} {word}", "chosen": "is good", "rejected": "is bad"} for noun, word in PAIRS],
    ),
    "labelled answers": (
        "answers.jsonl",
        'loss_type": "kto',
        [{"prompt": f"the {noun} {word}", "completion": "is it", "label": len(word) > 4} for noun, word in PAIRS],
    ),
    "multiple_choice": (
        "choices.jsonl",
        "MultipleChoiceData",
        [
            {"question": f"the {noun} is {word}", "choices": ["good", "bad"], "answer": len(word) % 2}
            for noun, word in PAIRS
        ],
    ),
}


@pytest.fixture(scope="module")
def t5(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    shape = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 40}
    ends = {"eos_token_id": 4, "decoder_start_token_id": 0, "pad_token_id": 0}
    T5ForConditionalGeneration(T5Config(**shape, **ends)).save_pretrained(folder)
    for file in encoder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_what_init_writes_for_every_task_runs(
    kind: str, encoder: Path, decoder: Path, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    name, part, rows = FILES[kind]
    text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
    Path(name).write_text(json.dumps(rows) if name.endswith(".json") else text, encoding="utf-8")
    task = kind if kind in init.FORMS else "preference" if kind == "labelled answers" else "causal_lm"
    base = {"causal_lm": decoder, "preference": decoder, "seq2seq": t5}.get(task, encoder)
    flags = ["--task", task, "--base", str(base), "--method", "LoRA", "--data", name]
    assert main(["init", *flags]) == 0
    written = Path("config.yaml").read_text(encoding="utf-8")
    assert part in written
    # Of what a model of 64 positions, and a tokenizer without a chat template, have too little.
    short = {
        "question_answering": ["--data.doc_stride", "8", "--data.max_question_length", "16"],
        "chats": ["--data.chat_template", "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"],
    }
    smaller = ["--data.max_length", "48", *short.get(kind, [])]
    quick = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "config.yaml", *quick, *smaller]) == 0


def test_init_knows_every_task_and_reads_the_data_first(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(init.FORMS) == set(TASKS)
    monkeypatch.chdir(tmp_path)
    Path("wrong.csv").write_text("words,label\na,b\n", encoding="utf-8")
    flags = ["--task", "sequence_classification", "--base", str(encoder), "--method", "LoRA", "--data", "wrong.csv"]
    assert main(["init", *flags]) == 2
    assert "text" in capsys.readouterr().err and not Path("config.yaml").exists()


def test_init_asks_for_what_no_flag_gives(
    encoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = iter(["", str(encoder), "AdapterP", str(reviews)])
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    assert main(["init"]) == 0
    written = Path("config.yaml").read_text(encoding="utf-8")
    assert "class_path: AdapterP" in written and "task: sequence_classification" in written
    assert [question.split()[0].rstrip(":") for question in asked] == ["task", "base", "method", "data"]
    assert main(["init"]) == 2
    Path("config.yaml").unlink()

    def end(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert main(["init"]) == 2 and not Path("config.yaml").exists()


@pytest.mark.parametrize("task", TASKS)
def test_doctor_knows_every_task(task: str, encoder: Path, decoder: Path, t5: Path, tmp_path: Path) -> None:
    base = {"causal_lm": decoder, "seq2seq": t5}.get(task, encoder)
    if task == "image_text_to_text":
        model_of("llava").save_pretrained(base := tmp_path)
    if task == "speech_seq2seq":
        save_whisper(base := tmp_path, width=16)
    need = doctor.training_memory(str(base), "AdapterP", task, 2, 16)
    assert need["parameters"] > need["gradients"] > 0 and need["Adam's moments"] == 2 * need["gradients"]
    assert need["activations, about"] > 0
