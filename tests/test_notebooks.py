"""The notebooks of the documentation have been executed as they stand, and their code runs, for fewer steps."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lit_peft

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
# What makes a run of minutes one of seconds.
REDUCED = [(r"STEPS = \d+", "STEPS = 2"), (r"(?s)METHODS = \{.*?\n\}", 'METHODS = {"HeadOnly": {}}')]


def code_cells(file: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def quick_code(file: Path) -> str:
    code = "\n\n".join("".join(cell["source"]) for cell in code_cells(file))
    for pattern, quick in REDUCED:
        code = re.sub(pattern, quick, code)
    assert "STEPS = 2" in code
    return code


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed(file: Path) -> None:
    cells = code_cells(file)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_that_a_notebook_imports_exists(file: Path) -> None:
    tree = ast.parse(quick_code(file))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    exec(compile(ast.Module(imports, []), file.name, "exec"), {})
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if ast.unparse(node.value) == "lit_peft"}
    assert all(hasattr(lit_peft, name) for name in used)


@pytest.mark.heavy
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path) -> None:
    code = quick_code(file)
    guarded = "if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in code.splitlines())
    (tmp_path / "notebook.py").write_text(guarded, encoding="utf-8")
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_two() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["compare", "own-method"]
