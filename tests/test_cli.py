"""The `lit-peft` command, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_peft.cli import main
from lit_peft.commands.lightning_cli import CLI

COMMAND = str(Path(sysconfig.get_path("scripts")) / "lit-peft")


def settings(encoder: Path, reviews: Path) -> list[str]:
    model = ["--model", "LoRA", "--model.base", str(encoder), "--model.task", "sequence_classification"]
    data = ["--data", "TextClassificationData", "--data.train", str(reviews), "--data.test_fraction", "0.2"]
    return [*model, "--model.learning_rate", "2e-2", *data, "--trainer.accelerator", "cpu"]


def test_fit_then_test_then_predict(
    encoder: Path, reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])

    def run(*arguments: str) -> str:
        capfd.readouterr()
        assert main(arguments) == 0
        out, errors = capfd.readouterr()
        assert "Traceback" not in errors
        return out

    out = run("fit", *settings(encoder, reviews), "--trainer.max_epochs", "15")
    for word in (
        "method:    LoRA",
        "trainable:",
        "precision: 32-true",
        "results:",
        "best val_accuracy",
        "adapter",
        "next:",
    ):
        assert word in out
    folder = tmp_path / "lit_peft_runs" / "version_0"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    following = out.rpartition("next:  lit-peft ")[2].split()
    table = run(*following)
    assert "test_accuracy" in table
    accuracy = float(table.partition("test_accuracy")[2].split()[1])
    assert accuracy > 0.7  # chance: 0.5
    out = run("predict", *following[1:], "--data.predict", str(reviews), "--output", "predictions.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(96))
    assert {row["label"] for row in rows} == {"neg", "pos"}


def test_training_that_ends_before_a_validation_keeps_its_last_step(
    encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    assert main(["fit", *settings(encoder, reviews), "--trainer.max_steps", "2"]) == 0
    out, folder = capsys.readouterr().out, tmp_path / "lit_peft_runs" / "version_0"
    assert "No validation was reached" in out
    following = out.rpartition("next:  lit-peft ")[2].split()
    assert following[-1].endswith("last.ckpt") and main(following) == 0
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    trained = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    ours = sorted(float(value.sum()) for name, value in trained.items() if "lora_B" in name)
    assert any(ours) and ours == sorted(float(value.sum()) for name, value in stored.items() if "lora_B" in name)


@pytest.mark.parametrize("given", [[], ["GracefulStop"], ["ExactResume"], ["GracefulStop", "ExactResume"]])
def test_a_callback_that_every_run_has_is_not_there_twice(
    given: list[str], encoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    monkeypatch.setattr(CLI, "after_fit", lambda cli: found.extend(type(c).__name__ for c in cli.trainer.callbacks))
    callbacks = [f"--trainer.callbacks+=lit_peft.callbacks.{name}" for name in given]
    assert main(["fit", *settings(encoder, reviews), *callbacks, "--trainer.max_steps", "1"]) == 0
    assert [found.count(name) for name in ("GracefulStop", "ExactResume")] == [1, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model", "Lora"], "'LoRA'"),
        (["--model.r", "0"], "r=0"),
        (["--model.r", "many"], "many"),
        (["--model.rank", "3"], "'rank'"),
        (["--model.target_modules", "[quary]"], "'query'"),
        (["--model.task", "causal"], "causal_lm"),
        (["--data.text_column", "txt"], "'text'"),
        (["--data.train", "EMPTY"], "empty"),
        (["--model.base", "NO_WEIGHTS"], "no weights"),
        (["--config", "KEY"], "'modle'"),
        (["--ckpt_path", "none.ckpt"], "'none.ckpt' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_paragraph_and_writes_nothing(
    change: list[str],
    said: str,
    encoder: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "empty.csv").write_text("")
    (tmp_path / "NO_WEIGHTS").mkdir()
    (tmp_path / "NO_WEIGHTS" / "config.json").write_text((encoder / "config.json").read_text())
    (tmp_path / "key.yaml").write_text("modle:\n  class_path: LoRA\n")
    places = {"EMPTY": "EMPTY/empty.csv", "NO_WEIGHTS": "NO_WEIGHTS", "KEY": "key.yaml"}
    change = [str(tmp_path / places[text]) if text in places else text for text in change]
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    status = main(["fit", *settings(encoder, reviews), *change])
    errors = capsys.readouterr().err
    assert status == 2
    assert said in errors
    paragraph = errors[errors.index("lit-peft: error:") :]
    assert len(paragraph.strip().splitlines()) == 1 and "Traceback" not in errors
    assert list(work.iterdir()) == []


def test_help_is_quick() -> None:
    def seconds(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start

    pairs = [(seconds(COMMAND, "--help"), seconds(sys.executable, "-c", "import torch")) for _ in range(3)]
    assert min(shown / torch for shown, torch in pairs) < 2.5


def test_what_must_be_given(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    assert main(["fit"]) == 2
    assert "--data, --model must be given" in capsys.readouterr().err


def test_testing_without_a_checkpoint_is_said(
    encoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    with pytest.warns(UserWarning, match="untrained"):
        assert main(["test", *settings(encoder, reviews)]) == 0


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "'fit'" in capsys.readouterr().err


def test_print_config_explains_every_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    with pytest.raises(SystemExit) as done:
        main(["fit", "--model", "LoRA", "--model.base", "x", "--data", "CausalLMData", "--print_config"])
    assert done.value.code in (0, None)
    printed = capsys.readouterr().out
    for text in ("# rank of each update", "lora_alpha: 16", "lr_scheduler: linear", "# examples per batch and device"):
        assert text in printed


def test_a_logger_whose_package_is_missing_is_one_line(
    encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    command = ["fit", "--model", "LoRA", "--model.base", str(encoder), "--model.task", "sequence_classification"]
    command += ["--data", "TextClassificationData", "--data.train", str(reviews), "--trainer.max_steps", "1"]
    assert main([*command, "--trainer.logger", "lightning.pytorch.loggers.CometLogger"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "needs a package that is not installed" in said and "comet" in said


def test_a_trainer_that_is_no_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("trainer: true\n")
    config = ["--config", str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")]
    assert main(["fit", *config, "--config", str(tmp_path / "run.yaml")]) == 2
    assert "trainer: True in a configuration: give the settings of the Trainer" in capsys.readouterr().err
