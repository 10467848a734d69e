"""`--log`: what the trackers' own readers find after a run."""

from __future__ import annotations

import json
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_peft.cli import main
from lit_peft.training.trackers import check_trackers, log_artifacts, make_trackers
from lit_peft.util.errors import LitPeftError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def fit(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `lit-peft fit` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    Path("texts.txt").write_text("".join(f"{'the film ' * (1 + n % 5)}is good and it was {n}\n" for n in range(20)))

    def run(*arguments: str, steps: int = 4) -> int:
        model = ["--model", "LoRA", "--model.base", str(decoder), "--model.target_modules", "all-linear"]
        data = [
            "--data",
            "CausalLMData",
            "--data.train",
            "texts.txt",
            "--data.max_length",
            "16",
            "--data.batch_size",
            "4",
        ]
        limits = ["--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1"]
        return main(["fit", *model, *data, *limits, "--trainer.enable_progress_bar", "false", *arguments])

    return run


def logged() -> dict[int, float]:
    """Steps and training losses of the run's own log."""
    import csv

    with Path("lit_peft_runs/version_0/metrics.csv").open() as file:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]}


def test_tensorboard(fit: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert fit("--log", "tensorboard,csv") == 0
    events: dict[int, float] = {}
    texts: list[str] = []
    for file in Path("lit_peft_runs/version_0/tensorboard").glob("events*"):
        found = EventAccumulator(str(file)).Reload()
        if "train_loss" in found.Tags()["scalars"]:
            events.update({event.step: event.value for event in found.Scalars("train_loss")})
        texts += [text for text in found.Tags()["tensors"] if text.startswith("config")]
    assert events == pytest.approx(logged()) and len(events) >= 3 and texts
    assert Path("lit_peft_runs/version_0/adapter/adapter_config.json").is_file()


def test_mlflow(fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert fit("--log", "mlflow") == 0
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("lit_peft").experiment_id])
    assert run.info.run_name == "lit_peft_runs/version_0" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(logged())
    assert run.data.params["r"] == "8" and run.data.params["task"] == "causal_lm"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "adapter"}
    assert json.loads(Path("lit_peft_runs/version_0/trackers.json").read_text()) == {"mlflow": run.info.run_id}
    # A run that is resumed goes on in the same run of the tracker.
    assert fit("--log", "mlflow", "--ckpt_path", "last", steps=6) == 0
    (same,) = client.search_runs([run.info.experiment_id])
    assert same.info.run_id == run.info.run_id
    assert max(metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")) == 5


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little for a header, so filled with zeros
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def test_wandb_offline(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert fit("--log", "wandb") == 0
    wandb.finish()
    (file,) = Path("lit_peft_runs/version_0/wandb").rglob("*.wandb")
    losses, names, artifacts = [], [], []
    end = time.monotonic() + 30
    while time.monotonic() < end:  # another process writes the file
        records = [wandb_internal_pb2.Record.FromString(data) for data in records_of(file)]
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.1)
    for record in records:
        if record.HasField("run"):
            names.append((record.run.project, record.run.display_name, record.run.run_id))
        for item in record.history.item:
            if "train_loss" in (item.key, *item.nested_key):
                losses.append(float(item.value_json))
        if record.HasField("artifact") or record.request.HasField("log_artifact"):
            artifacts.append(record)
    number = json.loads(Path("lit_peft_runs/version_0/trackers.json").read_text())["wandb"]
    assert names[0] == ("lit_peft", "lit_peft_runs/version_0", number)
    assert losses == pytest.approx(list(logged().values())) and artifacts


def test_trackio(fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert fit("--log", "trackio") == 0
    rows = SQLiteStorage.get_logs("lit_peft", "lit_peft_runs/version_0")
    found = {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}
    assert found == pytest.approx(logged())
    shown = capsys.readouterr().out
    assert shown.count("Run finished") == 1 and "Resumed existing run" not in shown


def test_a_prediction_starts_no_run(fit: Any, decoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert fit("--log", "tensorboard") == 0
    run = Path("lit_peft_runs/version_0")
    again = ["--config", str(run / "config.yaml"), "--ckpt_path", str(next(run.glob("checkpoints/*.ckpt")))]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(["predict", *again, "--data.predict", "texts.txt", "--trainer.limit_predict_batches", "1"]) == 0
    assert Path("lit_peft_runs/version_1/predictions.jsonl").is_file()
    assert not Path("lit_peft_runs/version_1/tensorboard").exists()
    assert not [warning for warning in shown if "callbacks used to create the checkpoint" in str(warning.message)]


def test_a_tracker_that_does_not_start_is_an_error_before_anything_is_loaded(
    fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:9")
    assert fit("--log", "mlflow") == 2
    shown = capsys.readouterr()
    assert "--log mlflow: the run cannot be started (" in shown.err and "set MLFLOW_TRACKING_URI" in shown.err
    assert "base:" not in shown.out


def test_a_tracker_that_refuses_the_files_is_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (logger,) = make_trackers(["tensorboard"], tmp_path / "version_0")
    with pytest.warns(UserWarning, match="TensorBoardLogger did not take the files of the run .*no_config"):
        log_artifacts([logger], tmp_path / "no_config.yaml", tmp_path / "adapter")


def test_wrong_names(
    fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--log", "tensorbord") == 2
    assert "--log 'tensorbord' is not known: use 'tensorboard'" in capsys.readouterr().err
    assert not Path("lit_peft_runs").exists()
    monkeypatch.setattr("lit_peft.training.trackers.find_spec", lambda name: None)
    with pytest.raises(LitPeftError, match="--log wandb needs a package that is not installed: pip install wandb"):
        check_trackers("csv, wandb")
    assert check_trackers(" csv,,") == ["csv"] and make_trackers(["csv"], tmp_path) == []
