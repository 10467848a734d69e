"""`lit-peft predict` over many rows: every row, in order, and none of them kept in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import WORDS

from lit_peft.util.memory import process_memory

ROWS = 3_000


@pytest.mark.heavy
@pytest.mark.skipif(not process_memory("RssAnon"), reason="memory is read from /proc")
def test_prediction_keeps_no_row(encoder: Path, tmp_path: Path) -> None:
    """A row's probabilities are 64 numbers and names, 4 kB: rows that are kept are 6 MB in the second half."""
    texts = [" ".join(WORDS[(at % 7 + step * (1 + at % 3)) % 18] for step in range(3 + at % 4)) for at in range(ROWS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    labels = json.dumps([f"label {at}" for at in range(64)])
    run = "from lit_peft.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", run, "predict", "--model", "LoRA", "--model.base", str(encoder)]
    command += ["--model.task", "sequence_classification", "--data", "TextClassificationData", "--data.labels", labels]
    command += ["--data.predict", "a.jsonl", "--data.batch_size", "8", "--output", "out.jsonl"]
    command += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIT_PEFT_CACHE": str(tmp_path / "cache")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet)
    partial = tmp_path / ".out.jsonl.partial-0"
    own: list[float] = []
    while process.poll() is None:
        if partial.exists() and ROWS / 2 < partial.read_bytes().count(b"\n") <= ROWS:
            own.append((process_memory("RssAnon", process.pid) or 0) / 2**20)  # tables mapped from disk do not count
        time.sleep(0.05)
    assert process.returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(ROWS)) and len(rows[0]["probabilities"]) == 64
    own = [memory for memory in own if memory]
    assert len(own) > 5
    grown = own[-1] - own[0]
    assert grown < 3, f"{grown:.1f} MB more at the end of the second half"
