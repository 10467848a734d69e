"""Testing and predicting in two processes give what one gives; predicting goes on after a kill."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from evaluate_run import main

import lit_peft

COMMAND = str(Path(sysconfig.get_path("scripts")) / "lit-peft")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, out: Path, die: int = 0) -> int:
    script = str(Path(__file__).with_name("evaluate_run.py"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out.mkdir(exist_ok=True)
    command = [sys.executable, *launch, script, str(folder), str(out), str(die)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert die or done.returncode == 0, done.stderr[-4000:]
    return done.returncode


def table(file: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("text", "label")) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


@pytest.fixture(scope="module")
def folder(encoder: Path, decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows of each kind: in batches of two, four and three to a process, the last of one row."""
    made = tmp_path_factory.mktemp("made")
    for base in (encoder, decoder):
        shutil.copytree(base, made / ("encoder" if base == encoder else "decoder"))
    shape = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    torch.manual_seed(0)
    ends = {"eos_token_id": 4, "decoder_start_token_id": 0, "pad_token_id": 0}
    config = transformers.T5Config(vocab_size=40, **shape, **ends)
    transformers.T5ForConditionalGeneration(config).save_pretrained(made / "t5")
    for file in encoder.glob("tokenizer*"):
        shutil.copy(file, made / "t5")
    texts = [
        f"the film {' '.join(['well'] * at)} is {word}"
        for at, word in enumerate(("good", "bad", "great", "poor", "weak", "awful", "well"))
    ]
    table(made / "two.csv", [(text, ("neg", "pos")[at % 3 > 0]) for at, text in enumerate(texts)])
    table(made / "three.csv", [(text, "aabbbcc"[at]) for at, text in enumerate(texts)])
    table(made / "number.csv", [(text, at * at / 3) for at, text in enumerate(texts)])
    table(made / "long.csv", [(f"{text} {end}", "pos") for end in ("it", "was", "bad") for text in texts])
    choices = [{"question": text, "choices": ["good", "bad story"], "answer": at % 2} for at, text in enumerate(texts)]
    (made / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    # A question's answers stand in both processes, and in several batches.
    asked = [
        {
            "paragraph": texts[at % 3],
            "question": "what is it",
            "answer": ["good", "bad", "great"][at // 3],
            "label": at % 2,
        }
        for at in range(7)
    ]
    (made / "multirc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (made / "one.jsonl").write_text(json.dumps(asked[1]))
    entities = ["good", "bad story", "great"]
    cloze = [
        {"passage": text, "query": "it was @placeholder", "entities": entities[: 1 + at], "answers": ["good"]}
        for at, text in enumerate(texts)
    ]
    (made / "record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cloze))
    pairs = [{"source": text, "target": text[9:]} for text in texts]
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    sums = [{"instruction": text, "answer": f"{at % 3}.0"} for at, text in enumerate(texts)]
    (made / "sums.json").write_text(json.dumps(sums))
    return made


@pytest.mark.heavy
def test_two_processes_measure_and_predict_what_one_does(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    main(folder, tmp_path / "one", 0)
    run(folder, tmp_path / "both")
    one, both = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "both"))
    names = {name for metrics in one.values() for name in metrics}
    wanted = "accuracy f1 mcc binary_f1 exact_match pearson spearman perplexity rouge1 rougeL bleu sacrebleu loss"
    assert {f"test_{name}" for name in (*wanted.split(), "answer_accuracy")} <= names
    assert {"test_exact_match", "test_f1"} <= set(one["record"]) & set(one["multirc"])
    assert 0 < one["sums"]["test_answer_accuracy"] < 1
    for kind, metrics in one.items():
        assert both[kind] == pytest.approx(metrics, abs=1e-5), kind
    for name in ("predictions", "sums"):
        whole = (tmp_path / "one" / f"{name}.jsonl").read_text()
        assert (tmp_path / "both" / f"{name}.jsonl").read_text() == whole
        assert [json.loads(line)["row"] for line in whole.splitlines()] == list(range(21 if name[0] == "p" else 7))
    rows = [json.loads(line) for line in whole.splitlines()]
    right = [float(row["answer"]) == float(row["gold"]) for row in rows]
    assert one["sums"]["test_answer_accuracy"] == pytest.approx(sum(right) / 7)
    # One of two dies; two go on, each with rows of both.
    assert run(folder, tmp_path / "dead", die=3) != 0
    partials = sorted((tmp_path / "dead").glob(".predictions.jsonl.partial-*"))
    assert partials and not (tmp_path / "dead" / "predictions.jsonl").exists()
    begun = sum(len(file.read_text().splitlines()) - 1 for file in partials)
    assert 6 <= begun < 21
    run(folder, tmp_path / "dead")
    assert (tmp_path / "dead" / "predictions.jsonl").read_text() == (tmp_path / "one" / "predictions.jsonl").read_text()
    assert not list((tmp_path / "dead").glob(".predictions*"))


def test_every_process_has_a_batch_of_what_is_left(decoder: Path, reviews: Path) -> None:
    data = lit_peft.CausalLMData(base=str(decoder), predict=str(reviews))
    data.trainer = SimpleNamespace(world_size=3)  # type: ignore[assignment]
    data.finished = set(range(96)) - {7}
    assert list(data.predict_dataloader().sampler) == [7, 95, 95]


@pytest.mark.heavy
def test_the_command_goes_on_after_a_kill(decoder: Path, tmp_path: Path) -> None:
    words = ("good", "bad", "great", "poor", "weak", "awful", "well", "wonderful")
    table(tmp_path / "a.csv", [(f"the film {x} is {y}", "pos") for x in words * 4 for y in words])
    settings = ["--model.base", str(decoder), "--data", "CausalLMData", "--data.predict", str(tmp_path / "a.csv")]
    settings += ["--model.generation", '{"max_new_tokens": 4}', "--data.batch_size", "2", "--seed_everything", "1"]
    command = [
        sys.executable,
        "-c",
        "from lit_peft.cli import main; raise SystemExit(main())",
        "predict",
        "--model",
        "LoRA",
        *settings,
    ]
    command += ["--trainer.enable_progress_bar", "false", "--output"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": ENVIRONMENT, "text": True, "stdout": subprocess.PIPE}
    killed = subprocess.Popen([*command, "a.jsonl"], **options, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".a.jsonl.partial-0"
    while not partial.exists() or partial.read_bytes().count(b"\n") < 40:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "a.jsonl").exists()
    begun = partial.read_bytes().count(b"\n") - 1
    done = subprocess.run([*command, "a.jsonl"], **options)
    assert done.returncode == 0 and f"{begun:,} rows in . are finished" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(256))
    assert [row["prompt"] for row in rows] == [f"the film {x} is {y}" for x in words * 4 for y in words]
