"""The project keeps to the limits of CONTRIBUTING.md, as `python tools/structure.py` counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from structure import MOST_METHODS, Structure

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found() -> Structure:
    return Structure(ROOT)


def test_few_files_belong_to_no_package(found: Structure) -> None:
    assert len(found.loose) <= 6, found.loose


def test_no_package_imports_from_one_above_it(found: Structure) -> None:
    assert not found.upward


def test_no_file_is_over_400_lines(found: Structure) -> None:
    assert not found.long_files


def test_no_class_has_more_than_25_methods(found: Structure) -> None:
    assert not [(name, methods) for name, methods, _ in found.classes if methods > MOST_METHODS]


def test_private_names_of_other_objects_are_used_in_the_internals_files_alone(found: Structure) -> None:
    assert not found.foreign_names


def test_what_is_counted(tmp_path: Path) -> None:
    (tmp_path / "lit_peft" / "nn").mkdir(parents=True)
    (tmp_path / "lit_peft" / "loose.py").write_text("from lit_peft import nn\n" + "x = 1\n" * 400)
    (tmp_path / "lit_peft" / "nn" / "a.py").write_text(
        "def f():\n    import lit_peft.methods.lora\n    torch._dynamo.reset(); self._own; other._own; other._x\n"
    )
    (tmp_path / "lit_peft" / "nn" / "torch_internals.py").write_text("torch._C")
    found = Structure(tmp_path)
    assert found.loose == ["lit_peft/loose.py"] and found.long_files == {"lit_peft/loose.py": 401}
    assert found.upward == {("nn", "methods"): 1} and found.arrows["loose", "nn"] == 1
    assert found.foreign_names == {"lit_peft/nn/a.py": ["_dynamo", "_x"]}
