"""benchmarks/gpu.py from end to end, on the tiny shape and whatever device there is."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
gpu = pytest.importorskip("gpu", reason="the benchmarks folder and peft are needed")
gpu_report = pytest.importorskip("gpu_report")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *groups: str) -> dict[str, dict[str, float]]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    gpu.main(["--shape", "tiny", "--rounds", "1", "--backend", "eager", "--out", str(folder), "--groups", *groups])
    assert (folder / "gpu-tiny.svg").stat().st_size > 0 and (folder / "gpu-tiny.md").read_text()
    rows: dict[str, dict[str, float]] = json.loads((folder / "gpu-tiny.json").read_text())["rows"]
    return rows


@pytest.mark.heavy
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, monkeypatch, *gpu.GROUPS)
    missing = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    assert set(missing) <= {"unsloth", "peft + Liger", "lit_peft, nf4"}, missing
    steps = [row for row in rows.values() if "third_loss" in row]
    assert len(steps) > 15 and all(row["ms"] > 0 and row["activations_gb"] > 0 for row in steps)
    assert rows["fit"]["ms"] > 0 and rows["bare loop"]["ms"] > 0
    same = [rows[name] for name in gpu.SAME_LOSS if "loss" in rows.get(name, {}) and "autocast" not in name]
    for key in ("loss", "third_loss"):
        values = torch.tensor([row[key] for row in same])
        assert (values - values[0]).abs().max() <= 1e-5 * values[0], key
    # The same tokens, but each example sees less of them.
    packed, eager = rows["lit_peft, packed rows"], rows["lit_peft, packed rows, eager"]
    assert abs(packed["loss"] - eager["loss"]) <= 1e-5 * eager["loss"] and packed["loss"] != rows["lit_peft"]["loss"]
    assert rows["decoding, LoRA"]["sum"] == rows["decoding, base"]["sum"]
    assert "(missed)" in capsys.readouterr().out or "goal" in (tmp_path / "gpu-tiny.md").read_text()


def test_losses_agree_with_peft(tmp_path: Path) -> None:
    bench = gpu.Workbench(gpu.SHAPES["tiny"], torch.device("cpu"), tmp_path / "base", "eager")
    ways = gpu.step_rows(bench)["steps"]
    ours, peft = (gpu.take_steps(ways[name](), torch.device("cpu"), 1) for name in ("lit_peft, eager", "peft"))
    for key in ("loss", "third_loss"):
        assert abs(ours[key] - peft[key]) <= 1e-5 * peft[key]
    assert ours["activations_gb"] < peft["activations_gb"]


def test_goals_and_rows_that_are_missing() -> None:
    rows = {
        "lit_peft": {"ms": 90.0, "loss": 5.0, "third_loss": 4.0},
        "peft": {"ms": 150.0, "loss": 5.0, "third_loss": 4.004},
        "Unsloth": {"ms": 90.0},
        "peft + Liger": {"skipped": "liger_kernel is not installed"},
        "decoding, base": {"tokens_s": 600.0},
        "decoding, LoRA": {"tokens_s": 540.0},
    }
    results = {"rows": rows, "device": "a card", "date": "today", "torch": "2", "shape": "1b", "tokens": 8, "rounds": 1}
    goals = gpu_report.goals(results)
    assert "| lit_peft: ms, by that of peft | 0.6 | ≤ 0.62 |" in goals
    assert "| lit_peft: ms, by that of Unsloth | 1 (missed) | ≤ 0.90 |" in goals
    assert "| decoding, LoRA: tokens/s, by that of decoding, base | 0.9 | ≥ 0.85 |" in goals
    assert "peft, autocast" not in goals
    assert "not measured: liger_kernel is not installed" in gpu_report.table(results)
    assert "1.0e-03 at the third step" in gpu_report.differences(results, ("lit_peft", "peft", "peft + Liger"))


def test_no_row_starts_when_the_time_is_over(tmp_path: Path) -> None:
    gpu.main(["--shape", "tiny", "--minutes", "-1", "--groups", "floors", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu-tiny.json").read_text())["rows"]
    assert [row["skipped"] for row in rows.values()] == ["the -1 minutes were over"] * 2
