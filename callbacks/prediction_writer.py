"""Predictions as JSON lines, in the order of the input."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes each predicted example as one JSON line with its row number, in input order over all processes.

    Prediction is resumable: rows are appended to `.NAME.partial-RANK` beside the file as they come, and the file
    appears whole at the end. The same command after a kill runs the missing rows alone, if the data module takes
    `finished` (a set of row numbers), and the data, the weights and the settings are the same; else it starts again.
    Testing writes what the task judges (generated text with its answer) in the same form, at once at the end.

    Args:
        output: the file; `predictions.jsonl` (of tests, `test_predictions.jsonl`) in the run's folder when unset.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self._partial: Any = None
        self._tested: list[tuple[int, dict[str, Any]]] = []

    def path(self, trainer: pl.Trainer) -> Path:
        """Return where the predictions go."""
        name = "test_predictions.jsonl" if trainer.testing else "predictions.jsonl"
        return Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / name)

    # -------------------------------------------------------------------------------------------- predicting

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the partial file, and tell the data module which rows it holds."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        path = Path(trainer.strategy.broadcast(str(self.path(trainer))))
        path.parent.mkdir(parents=True, exist_ok=True)
        key = _key(trainer, pl_module)
        data: Any = getattr(trainer, "datamodule", None)
        resumable = hasattr(data, "finished")
        finished: set[int] = set()
        stale = []
        for file in _partials(path):
            rows = _readable(file, key, own=file == self._file(trainer, path)) if resumable else {}
            finished.update(rows)
            stale += [] if rows else [file]
        trainer.strategy.barrier("partial predictions read")
        if trainer.is_global_zero:
            for file in stale:
                file.unlink()
        trainer.strategy.barrier("partial predictions cleared")
        if resumable:
            data.finished = finished
        if finished and trainer.is_global_zero:
            print(f"predictions: {len(finished):,} rows are in {path.parent} already; the others follow")
        elif trainer.is_global_zero and self.output is None:
            print(f"predictions: {path} (after an interruption, continue with --output {path})")
        own = self._file(trainer, path)
        new = not own.is_file()
        self._partial = own.open("a", encoding="utf-8")
        if new:
            self._append(json.dumps({"key": key}))

    def _file(self, trainer: pl.Trainer, path: Path) -> Path:
        return path.with_name(f".{path.name}.partial-{trainer.global_rank}")

    def _append(self, text: str) -> None:
        self._partial.write(text + "\n")
        # To the system, which outlives the process.
        self._partial.flush()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        start = batch_idx * len(prediction)
        numbers = batch_indices or range(start, start + len(prediction))
        self._append("\n".join(_line(number, row) for number, row in zip(numbers, prediction, strict=True)))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._partial.close()
        path = Path(trainer.strategy.broadcast(str(self.path(trainer))))
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            # A distributed sampler may repeat rows to even out the processes: each row number once.
            places = {number: (file, at) for file in _partials(path) for number, at in _places(file).items()}
            _write(path, (_read_line(*places[number]) for number in sorted(places)))
            for file in _partials(path):
                file.unlink()
            print(f"predictions: {path} ({len(places):,} rows)")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the partial file."""
        if self._partial is not None:
            self._partial.close()
            self._partial = None

    # ----------------------------------------------------------------------------------------------- testing

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tested = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = outputs.get("rows") if isinstance(outputs, dict) else None
        start = len(self._tested)
        # Processes take every n-th example in turn.
        step, first = trainer.world_size, trainer.global_rank
        self._tested += [(first + step * (start + at), row) for at, row in enumerate(rows or ())]

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gathered: list[Any] = [self._tested]
        if trainer.world_size > 1:
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._tested)
        rows = dict(row for part in gathered for row in part)
        if trainer.is_global_zero and rows:
            path = self.path(trainer)
            _write(path, (_line(number, rows[number]) for number in sorted(rows)))
            print(f"predictions: {path} ({len(rows):,} rows)")


def _line(number: int, row: dict[str, Any]) -> str:
    return json.dumps({"row": number, **row}, ensure_ascii=False)


def _write(path: Path, lines: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _partials(path: Path) -> list[Path]:
    start = f".{path.name}.partial-"
    return sorted(file for file in path.parent.iterdir() if file.name.startswith(start))


def _places(file: Path) -> dict[int, int]:
    """Return where each row's line begins, in bytes; the first line is the key."""
    places = {}
    with file.open("rb") as stream:
        at = len(stream.readline())
        for line in stream:
            places[json.loads(line)["row"]] = at
            at += len(line)
    return places


def _read_line(file: Path, at: int) -> str:
    with file.open("rb") as stream:
        stream.seek(at)
        return stream.readline().decode("utf-8").rstrip("\n")


def _readable(file: Path, key: str, own: bool) -> dict[int, int]:
    """Return the rows of a partial file of this key, after cutting off a line that a kill left half-written."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if own and whole < len(content):
        os.truncate(file, whole)
    first = content[: content.find(b"\n") + 1]
    if not first or json.loads(first) != {"key": key}:
        return {}
    return _places(file) if own or whole == len(content) else {}


def _key(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Hash what decides the predictions: the data's fingerprint, the weights or their file, and the settings."""
    data: Any = getattr(trainer, "datamodule", None)
    identity = data.identity("predict") if hasattr(data, "identity") else ""
    settings = json.dumps(dict(module.hparams), sort_keys=True, default=str)
    checkpoint = trainer.ckpt_path
    weights = ""
    if checkpoint and Path(checkpoint).is_file():
        state = Path(checkpoint).stat()
        weights = f"{Path(checkpoint).resolve()} {state.st_size} {state.st_mtime_ns}"
    else:
        digest = hashlib.sha256()
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
        weights = digest.hexdigest()
    return hashlib.sha256(f"{type(module).__name__}\0{identity}\0{settings}\0{weights}".encode()).hexdigest()
