"""`python tools/structure.py` counts what it says."""

from __future__ import annotations

from pathlib import Path

from structure import Structure


def test_a_small_project_is_counted(tmp_path: Path) -> None:
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
