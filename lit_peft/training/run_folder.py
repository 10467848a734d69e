"""The folder of a run: finding the one to go on with, and its log, which goes on too."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_peft.util.disk import write_file

CONFIG = "config.yaml"
METRICS = "metrics.csv"


def earlier_run(root: Path, config: dict[str, Any]) -> int | None:
    """The newest run below a folder that trains the same model on the same data; None if there is none.

    Args:
        root: folder of the folders `version_N`.
        config: what is to be run, as plain data.

    Returns:
        N.
    """
    folders = root.glob("version_*") if root.is_dir() else ()
    numbers = (int(folder.name[8:]) for folder in folders if folder.name[8:].isdecimal())
    for number in sorted(numbers, reverse=True):
        try:
            known = yaml.safe_load((root / f"version_{number}" / CONFIG).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(known, dict) and all(known.get(part) == config.get(part) for part in ("model", "data")):
            return number
    return None


def newest_last(folders: Iterable[Path]) -> Path | None:
    """The newest `last….ckpt` of some folders; None if there is none."""
    found = [path for folder in folders for path in folder.glob("last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


class _Writer(ExperimentWriter):
    """Lightning's, which does not begin by deleting the log that is there. `rows` is how many the log has on disk."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        # Killed before its first line was written, it is empty.
        header, *rows = (file.read_text(encoding="utf-8") if file.is_file() else "").splitlines() or [""]
        self.metrics_keys = header.split(",") if header else []
        self.rows = len(rows)

    def save(self) -> None:
        written = len(self.metrics)
        super().save()
        self.rows += written

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        # Lightning empties the file first: what is killed then has lost its log.
        file, text = Path(self.metrics_file_path), io.StringIO(newline="")
        with file.open(encoding="utf-8", newline="") as old:
            rows = list(csv.DictReader(old))
        writer = csv.DictWriter(text, fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_file(file, text.getvalue().encode())


class RunLogger(CSVLogger):
    """A `CSVLogger` that keeps the log of the run it resumes."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment

    @rank_zero_only
    def rows(self) -> int:
        """Bring the log to the disk; return the number of its rows."""
        self.save()
        found: int = self.experiment.rows
        return found

    @rank_zero_only
    def go_back(self, rows: int, row: dict[str, Any] | None = None) -> None:
        """Drop what a killed run logged after its checkpoint: it comes again.

        Args:
            rows: how many rows to keep.
            row: one to write after them, with its `step`.
        """
        file = Path(self.log_dir) / METRICS
        kept = file.read_bytes().splitlines(keepends=True)[: rows + 1] if rows and file.is_file() else []
        if kept:
            write_file(file, b"".join(kept))
        else:
            file.unlink(missing_ok=True)
            self.experiment.metrics_keys = []
        self.experiment.rows = max(len(kept) - 1, 0)
        if row is not None:
            self.log_metrics(row, row["step"])
            self.save()
