"""A slice of the campaign of killed processes and full disks, and the log on a full disk."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_peft.training.run_folder import RunLogger


def test_a_full_disk_leaves_no_part_of_a_row_in_the_log(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, name=None, version=0)
    file, hparams = tmp_path / "version_0" / "metrics.csv", tmp_path / "version_0" / "hparams.yaml"
    logger.log_hyperparams({"r": 4})
    logger.log_metrics({"train_loss": 0.5}, 0)
    logger.save()
    before, settings = file.read_bytes(), hparams.read_bytes()
    logger.log_metrics({"train_loss": 0.25}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a full disk, a part of the row fits.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            logger.experiment.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and hparams.read_bytes() == settings and logger.experiment.rows == 1
    logger.save()
    rows = [row.split(",") for row in file.read_text().splitlines()]
    assert rows == [["step", "train_loss"], ["0", "0.5"], ["1", "0.25"]] and logger.rows() == 2


def test_settings_in_the_log_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunLogger(tmp_path, name=None, version=0)
    file = tmp_path / "version_0" / "hparams.yaml"
    logger.log_hyperparams({"r": 4})
    before = file.read_bytes()
    with monkeypatch.context() as patched:

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            logger.log_hyperparams({"r": 8})
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
    logger.log_hyperparams({"r": 8})
    assert yaml.safe_load(file.read_text()) == {"r": 8}


@pytest.mark.heavy
def test_a_slice_of_the_fault_campaign_finds_nothing(tmp_path: Path) -> None:
    """The whole: `python tests/fault_campaign.py --kills 200 --full_disks 50`."""
    probe = "import os; raise SystemExit(os.getuid() and os.system('unshare --user --map-root-user --mount true') != 0)"
    disks = 10 if subprocess.run([sys.executable, "-c", probe]).returncode == 0 else 0
    script = Path(__file__).with_name("fault_campaign.py")
    command = [sys.executable, str(script), "--kills", "20", "--full_disks", str(disks), "--servers", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
