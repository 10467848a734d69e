"""`lit-peft compare`: a killed comparison goes on where it was, and its report says what its results say."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from lit_peft.cli import main
from lit_peft.commands import compare as module
from lit_peft.commands import measure
from lit_peft.commands.page import page
from lit_peft.commands.plan import Cell, Plan, make_cell, search_cells
from lit_peft.commands.recorder import Recorder
from lit_peft.commands.report import write_report
from lit_peft.commands.report_text import verdict
from lit_peft.commands.results import Results
from lit_peft.commands.summary import Difference, difference, summarize
from lit_peft.methods.registry import METHODS

COMMAND = str(Path(sysconfig.get_path("scripts")) / "lit-peft")


def config(folder: Path, encoder: Path, reviews: Path) -> Path:
    file = folder / "compare.yaml"
    file.write_text(
        f"""
base: {encoder}
task: sequence_classification
data:
  class_path: TextClassificationData
  init_args: {{ train: {reviews}, test_fraction: 0.2, batch_size: 8 }}
methods:
  LoRA: {{ target_modules: [query, value] }}
  PromptTuning: {{ num_virtual_tokens: 2 }}
trainer: {{ accelerator: cpu }}
steps: 4
evaluations: 2
trials: 2
seeds: 2
output: {folder}/out
"""
    )
    return file


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "base": "base",
        "task": "sequence_classification",
        "data": {"class_path": "TextClassificationData"},
        "methods": {"LoRA": {}, "HeadOnly": {}, "FullFineTuning": {}},
        "trials": 1,
        "seeds": 3,
    }
    return Plan(**{**values, **changes})


def row(method: str, seed: int, test: float, rate: float = 1e-3, **changes: Any) -> dict[str, Any]:
    values = {
        "cell": f"{method}{seed}{rate}",
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "metric": "accuracy",
        "mode": "max",
        "validation": test - 0.01,
        "test": test,
        "rows": 1000,
        "trainable": 1234 + len(method),
        "total": 100_000,
        "adapter_bytes": 5678,
        "peak_memory_bytes": 3 * 2**20,
        "seconds_per_step": 0.0123,
        "curve": [[2, 0.5, test - 0.2], [4, 1.0, test - 0.01]],
        "device": "cpu",
    }
    return {**values, **changes}


def rows(**accuracies: list[float]) -> list[dict[str, Any]]:
    return [row(method, seed, value) for method, values in accuracies.items() for seed, value in enumerate(values)]


@pytest.fixture(scope="module")
def resumed(encoder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, str]:
    """A comparison that goes on from its first result: its folder, the lines before, and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    file = config(folder, encoder, reviews)
    results = folder / "out" / "results.jsonl"
    plan = module.check_plan(module.read_plan(["--config", str(file)])[0])
    results.parent.mkdir()
    cell = search_cells(plan, "LoRA")[0]
    head = {"cell": cell.key, "method": cell.method, "learning_rate": cell.learning_rate, "seed": cell.seed}
    head["data_hash"] = cell.data_hash
    Results(results).add({**head, **measure.measure_in_process(cell)})
    before = results.read_bytes()
    # A line that a kill cut off.
    results.write_bytes(before + b'{"cell": "12')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["compare", "--config", str(file)]) == 0
    return folder / "out", before, printed.getvalue()


@pytest.mark.heavy
def test_a_killed_comparison_goes_on(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = [COMMAND, "compare", "--config", str(config(tmp_path, encoder, reviews))]
    results = tmp_path / "out" / "results.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(arguments, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        while not (results.is_file() and results.read_bytes().count(b"\n")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = results.read_bytes()
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = results.read_bytes()
    assert lines.startswith(before[: before.rfind(b"\n") + 1])
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len({row["cell"] for row in rows}) == len(rows) == 2 * (2 + 1)
    assert not any("error" in row for row in rows), rows
    assert done.stdout.count("(finished before)") == before.count(b"\n")


def test_a_comparison_runs_no_cell_twice(resumed: tuple[Path, bytes, str]) -> None:
    folder, before, printed = resumed
    lines = (folder / "results.jsonl").read_bytes()
    assert lines.startswith(before)
    done = [json.loads(line) for line in lines.splitlines()]
    assert len({one["cell"] for one in done}) == len(done) == 2 * (2 + 1)
    assert not any("error" in one for one in done), done
    assert printed.count("(finished before)") == before.count(b"\n")
    for method in ("LoRA", "PromptTuning"):
        own = [one for one in done if one["method"] == method]
        chosen = max((one for one in own if one["seed"] == 0), key=lambda one: one["validation"])
        assert [one["learning_rate"] for one in own if one["seed"] == 1] == [chosen["learning_rate"]]
        assert all([point[0] for point in one["curve"]] == [2, 4] for one in own)
        assert all(one["seconds_per_step"] > 0 and one["peak_memory_bytes"] > 0 for one in own)
    # r (in + out) for query and value of 2 layers of width 32, and the head; 2 tokens of width 32, and the head.
    head = 32 * 2 + 2
    assert {one["method"]: one["trainable"] for one in done} == {
        "LoRA": 2 * 2 * 8 * 64 + head,
        "PromptTuning": 2 * 32 + head,
    }


def test_the_report_has_the_results_numbers(resumed: tuple[Path, bytes, str]) -> None:
    folder, _, printed = resumed
    done = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    text = (folder / "report.md").read_text()
    assert text in printed
    for method in ("LoRA", "PromptTuning"):
        line = next(line for line in text.splitlines() if line.startswith(f"| {method} "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rate = next(one["learning_rate"] for one in done if one["method"] == method and one["seed"] == 1)
        own = [one for one in done if one["method"] == method and one["learning_rate"] == rate]
        values = [one["test"] for one in own]
        assert cells[1] == f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
        assert cells[3] == f"{own[0]['trainable']:,}"
        assert cells[4] == f"{100 * own[0]['trainable'] / own[0]['total']:.3f}"
        assert cells[5] == f"{own[0]['adapter_bytes'] / 1000:,.1f} kB"
        assert cells[9] == f"{rate:g}"
        assert line.split("|")[2].strip() in (folder / "report.html").read_text()


def test_a_report_of_what_is_finished_runs_nothing(
    resumed: tuple[Path, bytes, str], encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, *_ = resumed
    lines = (folder / "results.jsonl").read_bytes()
    arguments = ["compare", "--config", str(folder.parent / "compare.yaml"), "--report_only"]
    before = (folder / "report.md").read_text()
    assert main(arguments) == 0
    assert (folder / "report.md").read_text() == before and (folder / "results.jsonl").read_bytes() == lines
    # In the middle of one: the lines of one method, and half a line.
    half = tmp_path / "half"
    half.mkdir()
    own = b"".join(line for line in lines.splitlines(keepends=True) if b'"LoRA"' in line) + b'{"cell": "1'
    (half / "results.jsonl").write_bytes(own)
    assert main([*arguments, "--output", str(half)]) == 0
    assert "Not finished: 3 of 6 runs." in (half / "report.md").read_text() and "Not finished" not in before
    assert "| LoRA |" in (half / "report.md").read_text() and "Prompt" not in (half / "report.md").read_text()
    assert (half / "results.jsonl").read_bytes() == own
    capsys.readouterr()
    assert main([*arguments, "--output", str(half), "--steps", "5"]) == 2
    assert "no finished run of this configuration" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "none")]) == 2


def test_the_page_needs_nothing_else(resumed: tuple[Path, bytes, str]) -> None:
    pytest.importorskip("matplotlib")
    folder, *_ = resumed
    text = (folder / "report.html").read_text()
    assert "http" not in text and "//" not in text.replace("<!--", "")
    assert text.count("<svg") == 4
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', text))
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
    for name in ("quality_by_parameters", "quality_by_memory", "learning_curves", "learning_curves_by_time"):
        assert (folder / f"{name}.png").stat().st_size > 1000 and (folder / f"{name}.svg").stat().st_size > 1000


def test_noise_is_called_noise() -> None:
    alike = summarize(plan(), rows(LoRA=[0.80, 0.82, 0.81], HeadOnly=[0.6] * 3, FullFineTuning=[0.81, 0.81, 0.82]))
    said = " ".join(verdict(alike))
    assert re.search(r"full fine-tuning, within noise: LoRA -0\.003", said)
    assert re.search(r"head alone, above noise: LoRA \+0\.210", said)
    apart = summarize(plan(), rows(LoRA=[0.70, 0.71, 0.70], FullFineTuning=[0.81, 0.81, 0.82]))
    assert "full fine-tuning, above noise: LoRA -0.110" in " ".join(verdict(apart))


def test_the_noise_is_the_paired_interval_or_the_sampling_error() -> None:
    from scipy import stats

    first, second = [0.80, 0.90, 0.70], [0.70, 0.88, 0.68]
    one, other = summarize(plan(), rows(LoRA=first, HeadOnly=second))
    found = difference(one, other)
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found.value == pytest.approx(statistics.fmean(gaps))
    assert found.noise == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    # With many seeds it may be a little wider, and is never narrower.
    first, second = [0.6 + 0.1 * (seed % 3) for seed in range(13)], [0.5 - 0.1 * (seed % 2) for seed in range(13)]
    one, other = summarize(plan(), rows(LoRA=first, HeadOnly=second))
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert 1 <= 2 * difference(one, other).noise / (interval.high - interval.low) < 1.1
    one, other = summarize(plan(seeds=1), rows(LoRA=[0.8], HeadOnly=[0.79]))
    assert difference(one, other).noise == pytest.approx(1.96 * math.sqrt((0.8 * 0.2 + 0.79 * 0.21) / 1000))
    assert not Difference(1.0, math.nan).significant


def test_loss_is_better_when_lower_and_one_seed_knows_no_noise() -> None:
    def lossy(method: str, value: float) -> dict[str, Any]:
        return row(method, 0, value, metric="loss", mode="min", curve=[[4, 1.0, value]])

    found = summarize(plan(seeds=1), [lossy("LoRA", 2.1), lossy("HeadOnly", 3.0), lossy("FullFineTuning", 2.0)])
    assert [one.method for one in found] == ["FullFineTuning", "LoRA", "HeadOnly"]
    assert [one.reached for one in found] == [1.0, 1.0, None]  # 2.0 / 0.95 = 2.105
    said = " ".join(verdict(found))
    assert "the noise is unknown" in said and "above noise" not in said and "within noise" not in said
    shown = page(plan(seeds=1), found, [], {})
    assert "within noise" not in shown and "noise unknown" in shown and 'class="tag less"' not in shown


def test_a_failed_run_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = [{"error": "ValueError: no"}, row("LoRA", 0, 0.8)]
    ran: list[Cell] = []

    def pretend(cell: Cell, device: int | None) -> dict[str, Any]:
        ran.append(cell)
        answer = answers[len(ran) - 1]
        return {
            name: value for name, value in answer.items() if name not in ("cell", "method", "learning_rate", "seed")
        }

    monkeypatch.setattr(module, "measure_in_process", pretend)
    wanted = plan(methods={"LoRA": {}}, trials=2, seeds=1)
    done = module.compare(wanted, Results(tmp_path / "results.jsonl"))
    write_report(tmp_path, wanted, done)
    assert "Failed: LoRA at 0.0005: ValueError: no" in (tmp_path / "report.md").read_text()
    answers.append(row("LoRA", 0, 0.9))
    module.compare(wanted, Results(tmp_path / "results.jsonl"))
    assert [cell.learning_rate for cell in ran] == [5e-4, 1.5e-3, 5e-4]


def test_the_search_is_around_the_usual_rate_and_keys_tell_runs_apart() -> None:
    wanted = plan(methods={"LoRA": {"learning_rate": 1e-3}}, trials=4, spread=2)
    assert [cell.learning_rate for cell in search_cells(wanted, "LoRA")] == [1e-3, 2e-3, 5e-4, 4e-3]
    cell = make_cell(wanted, "LoRA", 1e-3, 0)
    assert cell.key == make_cell(plan(methods={"LoRA": {}}, seeds=9), "LoRA", 1e-3, 0).key
    others = [
        make_cell(wanted, "LoRA", 2e-3, 0),
        make_cell(wanted, "LoRA", 1e-3, 1),
        make_cell(plan(steps=5), "LoRA", 1e-3, 0),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 4
    timed = [make_cell(plan(steps=steps, seconds=9.0), "LoRA", 1e-3, 0) for steps in (5, 6)]
    assert timed[0].key == timed[1].key != cell.key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "Lora"], "'LoRA'"),
        (["--methods", "AdapterH,Lora"], "'LoRA'"),
        (["--steps", "0"], "steps=0"),
        (["--stepps", "1"], "--stepps"),
        (["--config", "none.yaml"], "'none.yaml' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_paragraph_and_writes_nothing(
    arguments: list[str], said: str, encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["compare", "--config", str(config(tmp_path, encoder, reviews)), *arguments])
    errors = capsys.readouterr().err
    assert status == 2 and said in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"methods": ["LoRA"]},
        {"methods": {"LoRA": 3}},
        {"methods": None},
        {"data": None},
        {"data": ["class_path"]},
        {"data": {"class_path": "CausalLMData", "init_args": 3}},
        {"model": [1]},
        {"model": {"learning_rate": 1e-3}},
        {"trainer": {"max_steps": 3}},
        {"trainer": {"devices": 2}},
        {"trainer": {"precison": "bf16-mixed"}},
        {"spread": "wide"},
        {"output": 3},
    ],
    ids=str,
)
def test_values_of_another_kind_are_told(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"base": "b", "task": "causal_lm", "data": {"class_path": "CausalLMData"}, **values}))
    assert main(["compare", "--config", str(file)]) == 2
    errors = capsys.readouterr().err
    assert next(iter(values)) in errors and len(errors.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_every_method_is_compared() -> None:
    assert list(plan(methods={name: {} for name in METHODS}).methods) == list(METHODS)
    assert list(Plan("base", "causal_lm", {"class_path": "CausalLMData"}).methods) == list(METHODS)
    assert len(METHODS) == 11


@pytest.mark.heavy
def test_a_budget_of_time_and_several_devices(
    encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--config", str(config(tmp_path, encoder, reviews)), "--trials", "1"]
    assert main([*arguments, "--seconds", "0.5", "--devices", "2"]) == 0
    done = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert sorted((one["method"], one["seed"]) for one in done) == [
        (method, seed) for method in ("LoRA", "PromptTuning") for seed in (0, 1)
    ]
    for one in done:
        assert one["curve"][-1][0] == one["steps"] >= 1
    assert "fit in 0.5 s of training" in (tmp_path / "out" / "report.md").read_text()
    capsys.readouterr()
    assert main([*arguments, "--seconds", "0.5", "--devices", "2"]) == 0
    assert capsys.readouterr().out.count("(finished before)") == 4


def test_devices_are_each_given_to_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy: set[int | None] = set()
    used: list[int | None] = []

    def pretend(cell: Cell, device: int | None) -> dict[str, Any]:
        assert device not in busy and len(busy) < 3
        busy.add(device)
        used.append(device)
        time.sleep(0.01)
        busy.remove(device)
        return {"error": "no"} if cell.method == "HeadOnly" else row(cell.method, cell.seed, 0.8)

    monkeypatch.setattr(module, "measure_in_process", pretend)
    wanted = plan(trials=2, devices=3)
    done = module.compare(wanted, Results(tmp_path / "results.jsonl"))
    assert set(used) == {0, 1, 2} and len(done) == 2 * 3 + 2 * 2


def test_a_budget_of_time_is_as_many_steps_as_fit(
    encoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def fake(self: Recorder) -> float:
        taken.append(len(self._times))
        return 0.02

    monkeypatch.setattr(Recorder, "seconds_per_step", property(fake))
    wanted, _ = module.read_plan(["--config", str(config(tmp_path, encoder, reviews)), "--seconds", "1.01"])
    assert measure.steps_in_budget(make_cell(wanted, "LoRA", 1e-3, 0), None) == 50
    accumulated = dataclasses.replace(wanted, trainer={"accelerator": "cpu", "accumulate_grad_batches": 2})
    assert measure.steps_in_budget(make_cell(accumulated, "LoRA", 1e-3, 0), None) == 25
    # An epoch's last batch steps alone.
    assert taken[0] == 16 and 16 < taken[1] <= 32
