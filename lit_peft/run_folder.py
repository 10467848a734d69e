"""The folder of a run: finding the one to go on with, and its log, which goes on too."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_peft.disk import write_file

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
    numbers = (int(folder.name[8:]) for folder in folders if folder.name[8:].isdigit())
    for number in sorted(numbers, reverse=True):
        try:
            known = yaml.safe_load((root / f"version_{number}" / CONFIG).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(known, dict) and all(known.get(part) == config.get(part) for part in ("model", "data")):
            return number
    return None


def newest_last(folders: Iterable[Path]) -> Path | None:
    """The newest `last….ckpt` of some folders; None if there is none."""
    found = [path for folder in folders for path in folder.glob("last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


class RunLogger(CSVLogger):
    """A `CSVLogger` that goes on with the log of the run it resumes, and that is on the disk with every checkpoint."""

    _resumed = False

    @property
    def experiment(self) -> Any:
        if self._experiment is None and not getattr(rank_zero_only, "rank", 0):
            # Lightning's writer begins by deleting what is there.
            file = Path(self.log_dir) / METRICS
            earlier = file.read_bytes() if file.is_file() else None
            file.unlink(missing_ok=True)
            writer = super().experiment
            if earlier is not None:
                write_file(file, earlier)
                writer.metrics_keys = earlier.decode().partition("\n")[0].strip().split(",")
            self._resumed = earlier is not None
            return writer
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment  # noqa: B018  the log that is there is found
        if self._resumed and step is not None:
            self._resumed = False
            self._forget(step)
        super().log_metrics(metrics, step)

    def _forget(self, step: int) -> None:
        """Drop the rows that a killed run wrote after its checkpoint: they come again."""
        file = Path(self.log_dir) / METRICS
        with file.open(newline="", encoding="utf-8") as handle:
            lines = handle.readlines()
        at = next(csv.reader(lines[:1])).index("step")
        kept = [lines[0]]
        for line in lines[1:]:
            cells = next(csv.reader([line]))
            # A line that was being written when the run was killed is cut short.
            if line.endswith("\n") and len(cells) > at and cells[at].isdigit() and int(cells[at]) < step:
                kept.append(line)
        write_file(file, "".join(kept).encode())

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if self._experiment is not None:
            self.save()
