"""The README's Python examples run as they stand, on a tiny model."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block-{number}" for number in range(1, len(BLOCKS) + 1)])
def test_example(code: str, decoder: Path, tmp_path: Path) -> None:
    rows = [f'{{"text": "{" ".join(words)}"}}' for words in itertools.permutations(("good", "film", "the", "story"))]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(decoder)
    code = code.replace("max_steps=100", "max_steps=2")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 4
