"""What type checkers and editors see: the stubs are those of the code, and mypy finds a wrong argument."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import make_stubs
import pytest

import lit_peft
from lit_peft.methods.registry import METHODS

SCRIPT = """
import lit_peft
import lit_peft.callbacks
from torch import nn
class Model(nn.Module): ...

right = lit_peft.LoRA(base="x", task="causal_lm", r=8)
wrong = lit_peft.LoRA(base="x", task="causal_lm", r="eight")
unknown = lit_peft.PrefixTuning(base="x", num_virtual_token=3)
reveal_type(right.settings.r)
reveal_type(lit_peft.attach)
reveal_type(lit_peft.attach(Model(), lit_peft.LoRASettings(r=8)))
missing = lit_peft.LoRa
reveal_type(lit_peft.callbacks.Throughput)
"""
WANTED = {
    8: 'error: Argument "r" to "LoRA" has incompatible type "str"; expected "int"',
    9: 'error: Unexpected keyword argument "num_virtual_token" for "PrefixTuning"',
    10: 'note: Revealed type is "int"',
    11: 'note: Revealed type is "def [Model',
    12: 'note: Revealed type is "script.Model"',
    13: 'error: Module has no attribute "LoRa"',
    14: 'note: Revealed type is "def (every_n_steps: int | None =',
}


def check(folder: Path, *config: str) -> dict[int, list[str]]:
    """Run mypy on the script; return its messages by line."""
    # As a wheel installs it: mypy does not follow an editable install.
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(make_stubs.ROOT / "lit_peft", folder / "site" / "lit_peft", ignore=ignore)
    shutil.copytree(make_stubs.ROOT / "callbacks", folder / "site" / "lit_peft" / "callbacks", ignore=ignore)
    (folder / "script.py").write_text(SCRIPT)
    (folder / "mypy.ini").write_text("\n".join(["[mypy]", "ignore_missing_imports = True", *config]))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", ".cache", "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "MYPYPATH": "site"})
    found: dict[int, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("script.py:"):
            _, number, message = line.split(":", 2)
            found.setdefault(int(number), []).append(message.strip().replace("builtins.", ""))
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("file", make_stubs.stubs(), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_stubs_are_those_of_the_code(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == make_stubs.stubs()[file], "run `python tools/make_stubs.py`"


@pytest.mark.parametrize("name", METHODS)
def test_the_stub_of_a_method_has_the_arguments_of_its_init(name: str) -> None:
    scope: dict[str, object] = {}
    exec(compile(make_stubs.method_modules(), "modules.pyi", "exec"), scope)
    stub = inspect.signature(scope[name].__init__).parameters  # type: ignore[misc]
    real = inspect.signature(getattr(lit_peft, name).__init__).parameters
    assert list(stub) == list(real) and "base" in stub
    for parameter in real.values():
        assert stub[parameter.name].kind == parameter.kind
        if parameter.default is None or isinstance(parameter.default, str | bool | int | float):
            assert stub[parameter.name].default == parameter.default


@pytest.mark.parametrize("others", ["skip", pytest.param("silent", marks=pytest.mark.heavy)])
def test_mypy_checks_the_arguments_of_a_method(others: str, tmp_path: Path) -> None:
    """Without the types of other libraries, which takes a third of the time, and with them."""
    pytest.importorskip("mypy", reason="types are checked where mypy is installed")
    libraries = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "tokenizers")
    found = check(tmp_path, *(f"[mypy-{name}.*]\nfollow_imports = {others}" for name in libraries))
    assert list(found) == list(WANTED)
    assert all(found[number][0].startswith(text) for number, text in WANTED.items()), found
