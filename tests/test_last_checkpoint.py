"""The last checkpoint, as `lit-peft fit` writes it by default: apart from the best one, and often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_resume import HERE, KILLS, same_run, write_config

OFTEN = {"class_path": "lit_peft.callbacks.LastCheckpoint", "init_args": {"every_n_minutes": 0.002}}
STEPS = {"class_path": "lit_peft.callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"callbacks": None},
    "default, accumulated": {"callbacks": None, "val_check_interval": 3, "accumulate_grad_batches": 2},
    "steps, within epochs": {"callbacks": [STEPS], "val_check_interval": 4, "accumulate_grad_batches": 1},
    "clock": {"callbacks": [OFTEN]},
    "clock, no validation": {"callbacks": [OFTEN], "validation": False},
}


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["moves", "times"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_killed_run_is_the_uninterrupted_one(
    kind: str, where: str, workers: int, decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    """`kill -9`, without callbacks of one's own, or with nothing but a more frequent last checkpoint."""
    settings = {"accumulate_grad_batches": 1, **KINDS[kind]}
    validates = settings.pop("validation", True)
    config = write_config(tmp_path, decoder, reviews, epochs=4 + 3 * KILLS, **settings)
    content = yaml.safe_load(config.read_text())
    content["data"]["init_args"]["num_workers"] = workers
    if not validates:
        content["data"]["init_args"]["validation_fraction"] = 0.0
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(HERE / "kill_run.py"), where, str(tmp_path), str(KILLS), str(KILLS), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "killed" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    assert done.stdout.count("kill ") == KILLS
    runs = tmp_path / "whole/runs/version_0", tmp_path / "killed/runs/version_0"
    assert len(list((tmp_path / "killed" / "runs").iterdir())) == 1
    same_run(*runs)
    # Nothing that was half done or that belongs to nobody is left: not even hidden.
    assert [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in runs[:1]] == [
        sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in runs[1:]
    ]
