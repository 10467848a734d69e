"""Write predictions as JSON lines, in the order of the input."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from lit_peft.util.disk import whole_file
from lit_peft.util.errors import LitPeftError


class PredictionWriter(BasePredictionWriter):
    """Writes each predicted example as one JSON line with its row number, in input order over all processes.

    Prediction can be resumed: rows are appended to `.NAME.partial-RANK` next to the file, and the complete file is
    written at the end. After a kill, the same command computes only the missing rows, if the data module accepts
    `finished` (a set of row numbers) and the data, the weights and the settings are the same; else it starts again.
    Testing writes the text that the task generated and evaluated in the same form, at the end.

    Raises:
        LitPeftError: there are several loaders to predict.

    Args:
        output: the file; `predictions.jsonl` (for tests `test_predictions.jsonl`) in the run's folder if unset.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self._partial: Any = None
        self._key = ""
        self._seen = 0
        self._tested: list[tuple[int, dict[str, Any]]] = []

    def path(self, trainer: pl.Trainer) -> Path:
        """Return the path of the predictions."""
        name = "test_predictions.jsonl" if trainer.testing else "predictions.jsonl"
        return Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / name)

    # -------------------------------------------------------------------------------------------- predicting

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the partial file, and tell the data module which rows are finished."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        path = Path(trainer.strategy.broadcast(str(self.path(trainer))))
        path.parent.mkdir(parents=True, exist_ok=True)
        key = _key(trainer, pl_module)
        data: Any = getattr(trainer, "datamodule", None)
        resumable = hasattr(data, "finished")
        found = {file: _places(file, key) if resumable else ({}, 0) for file in _partials(path)}
        finished = {row for places, _ in found.values() for row in places}
        trainer.strategy.barrier("partial predictions read")
        if trainer.is_global_zero:
            for file, (places, end) in found.items():
                if places:
                    os.truncate(file, end)
                else:
                    file.unlink()
        trainer.strategy.barrier("partial predictions cleared")
        if resumable:
            data.finished = finished
        if finished and trainer.is_global_zero:
            print(f"predictions: {len(finished):,} rows in {path.parent} are finished; computing the others")
        elif trainer.is_global_zero and self.output is None:
            print(f"predictions: {path} (after an interruption, continue with --output {path})")
        own = self._file(trainer, path)
        new = not own.is_file()
        self._partial = own.open("a", encoding="utf-8")
        self._key, self._seen = key, 0
        if new:
            self._partial.write(json.dumps({"key": key}) + "\n")

    def _file(self, trainer: pl.Trainer, path: Path) -> Path:
        return path.with_name(f".{path.name}.partial-{trainer.global_rank}")

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
        if dataloader_idx:
            raise LitPeftError(
                "PredictionWriter numbers the rows of a single loader, but there are several: call trainer.predict for "
                "each loader, each time with another output."
            )
        # Loaders without a sampler report no row numbers; with n processes, each takes every n-th example.
        step, first = trainer.world_size, trainer.global_rank + trainer.world_size * self._seen
        self._seen += len(prediction)
        numbers = batch_indices or range(first, first + step * len(prediction), step)
        for number, row in zip(numbers, prediction, strict=True):
            self._partial.write(_line(number, row) + "\n")
        # Pass it to the operating system, so that it survives a kill of the process.
        self._partial.flush()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._partial.close()
        path = Path(trainer.strategy.broadcast(str(self.path(trainer))))
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            # A distributed sampler may repeat rows so that all processes have equally many: keep each row once.
            files = _partials(path)
            places = {
                row: (index, place)
                for index, file in enumerate(files)
                for row, place in _places(file, self._key)[0].items()
            }
            with contextlib.ExitStack() as stack:
                streams = [stack.enter_context(file.open("rb")) for file in files]
                _write(path, (_line_at(streams[index], place) for _, (index, place) in sorted(places.items())))
            for file in files:
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
        # With n processes, each takes every n-th example.
        step, first = trainer.world_size, trainer.global_rank
        self._tested += [(first + step * (start + index), row) for index, row in enumerate(rows or ())]

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
    """Write a file so that it is never incomplete."""
    with whole_file(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _partials(path: Path) -> list[Path]:
    start = f".{path.name}.partial-"
    return sorted(file for file in path.parent.iterdir() if file.name.startswith(start))


def _places(file: Path, key: str) -> tuple[dict[int, int], int]:
    """Return the offset of each row's line in a partial file, and the end of the last complete line, in bytes.

    A kill may leave an incomplete line. A file whose first line has another key has no rows.
    """
    places: dict[int, int] = {}
    with file.open("rb") as stream:
        first = stream.readline()
        if _parsed(first) != {"key": key}:
            return {}, 0
        end = len(first)
        for line in stream:
            row = _parsed(line)
            if row is None:
                break
            places[row["row"]] = end
            end += len(line)
    return places, end


def _parsed(line: bytes) -> Any:
    """Return the content of a line; None if it is incomplete."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _line_at(stream: BinaryIO, place: int) -> str:
    stream.seek(place)
    return stream.readline().decode("utf-8").rstrip("\n")


def _key(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return a hash of all that determines the predictions: data, weights (or their file) and settings."""
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
