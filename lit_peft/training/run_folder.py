"""The folder of a run: which one to resume, and its log, which a resumed run continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_peft.training.lightning_internals import AppendingCSVLogger
from lit_peft.util.disk import clear_dead, clear_folder, write_failure, write_file
from lit_peft.util.errors import LitPeftError
from lit_peft.util.locks import FolderInUseError, FolderLock, lock_folder

CONFIG = "config.yaml"
DATA = "data.json"
METRICS = "metrics.csv"


def earlier_run(root: Path, config: dict[str, Any]) -> int | None:
    """Return the number of the newest run of the same model, data and seed; None if there is none.

    Args:
        root: the folder that contains the folders `version_N`.
        config: the configuration of the new run, as plain data.

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
        if isinstance(known, dict) and all(
            known.get(part) == config.get(part) for part in ("model", "data", "seed_everything")
        ):
            return number
    return None


def newest_last(folders: Iterable[Path]) -> Path | None:
    """Return the newest `last….ckpt` in some folders; None if there is none."""
    found = [path for folder in folders for path in folder.glob("last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


# The locks of runs that this process has.
_locks: list[FolderLock] = []


@rank_zero_only
def lock_run(folder: Path) -> None:
    """Lock the folder of a run for this process, and remove what killed processes left half written in it.

    Only the first of a run's processes does this, since the others write nothing of their own accord.

    Raises:
        LitPeftError: another process writes to the folder.
    """
    try:
        _locks.append(lock_folder(folder))
    except FolderInUseError as error:
        raise LitPeftError(
            f"{folder} is in use: {error.owner} is training that run. Wait until it ends, or stop it; or start a new "
            "run, without --ckpt_path last."
        ) from None
    clear_folder(folder)


def unlock_runs() -> None:
    """Give back the locks of all runs."""
    while _locks:
        _locks.pop().release()


@rank_zero_only
def new_run(root: Path) -> int:
    """Create and lock the folder of a new run. Of runs that start at once, each gets its own.

    What killed runs left half-written in their folders is removed.

    Args:
        root: the folder that contains the folders `version_N`.

    Returns:
        N; on other processes than the first, None, and nothing is created.
    """
    folders = [folder for folder in root.glob("version_*") if folder.name[8:].isdecimal()]
    known = [int(folder.name[8:]) for folder in folders]
    clear_dead(folders)
    number = max(known, default=0)
    while True:
        folder = root / f"version_{number}"
        # A run that was killed before it wrote anything left an empty folder.
        if not folder.exists() or (folder.is_dir() and not any(folder.glob("[!.]*"))):
            with contextlib.suppress(FolderInUseError):
                lock = lock_folder(folder)
                if not any(folder.glob("[!.]*")):
                    _locks.append(lock)
                    return number
                lock.release()
        number += 1


class RunLogger(AppendingCSVLogger):
    """A `CSVLogger` that keeps the log of the run that it resumes."""

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged to the disk.

        Raises:
            LitPeftError: it cannot be written.
        """
        try:
            super().save()
        except OSError as error:
            raise LitPeftError(write_failure("The log", Path(self.log_dir) / METRICS, error)) from error

    @rank_zero_only
    def rows(self) -> int:
        """Write the log to the disk; return the number of its rows."""
        self.save()
        count: int = self.experiment.rows
        return count

    @rank_zero_only
    def go_back(self, rows: int, row: dict[str, Any] | None = None) -> None:
        """Remove what a killed run logged after its checkpoint, since the resumed run logs it again.

        Args:
            rows: number of rows to keep.
            row: a row to append to them, with its `step`.
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
