"""The notebooks of the documentation have been executed as they stand, and their code runs, for fewer steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
# What makes a run of minutes one of seconds.
REDUCED = [(r"STEPS = \d+", "STEPS = 2"), (r"(?s)METHODS = \{.*?\n\}", 'METHODS = {"HeadOnly": {}}')]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed_and_runs(file: Path, tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    for pattern, quick in REDUCED:
        code = re.sub(pattern, quick, code)
    assert "STEPS = 2" in code
    guarded = "if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in code.splitlines())
    (tmp_path / "notebook.py").write_text(guarded, encoding="utf-8")
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_two() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["compare", "own-method"]
