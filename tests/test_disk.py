"""Folders of runs and adapters, as killed processes leave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_peft.training.run_folder import earlier_run
from lit_peft.util.disk import replace_folder, temporary_folder


def written(target: Path, text: str) -> Path:
    folder = temporary_folder(target)
    (folder / "file").write_text(text)
    return folder


@pytest.mark.parametrize("at", [None, "before the new one stands", "before the old one goes"])
def test_a_folder_is_replaced_after_one_that_was_killed(at: str | None, tmp_path: Path) -> None:
    target, old = tmp_path / "adapter", tmp_path / ".adapter.old"
    replace_folder(written(target, "1"), target)
    if at is not None:
        target.rename(old)
    if at == "before the old one goes":
        written(target, "2").rename(target)
    replace_folder(written(target, "3"), target)
    assert (target / "file").read_text() == "3" and list(tmp_path.iterdir()) == [target]


def test_runs_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    config = {"model": {"r": 8}, "data": {"train": "a"}}
    for name, content in {
        "version_0": b"{model: {r: 8}, data: {train: a}, trainer: 3}",
        "version_1": b"{model: {r: 4}, data: {train: a}}",
        "version_2": b"{model",
        "version_3": b"model: caf\xe9",
        "version_\u00b2": b"{model: {r: 8}, data: {train: a}}",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_bytes(content)
    (tmp_path / "version_4").mkdir()
    assert earlier_run(tmp_path, config) == 0
    assert earlier_run(tmp_path, {**config, "data": {}}) is earlier_run(tmp_path / "none", config) is None
