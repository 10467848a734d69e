"""The Python examples of the README and the documentation run as they stand, on a tiny model; the site builds."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import lit_peft

ROOT = Path(__file__).parents[1]
BLOCKS = {
    f"{page.stem}-{number}": textwrap.dedent(code)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, (_, code) in enumerate(
        re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE),
        start=1,
    )
}


@pytest.fixture
def script_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run scripts in, inside this process; what they change in it is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS)
def test_example(code: str, decoder: Path, script_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = script_folder
    rows = [f'{{"text": "{" ".join(words)}"}}' for words in itertools.permutations(("good", "film", "the", "story"))]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(decoder)
    code = code.replace("max_steps=100", "max_steps=2")
    module = types.ModuleType("__main__")  # classes of a script can be pickled
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(code, "example", "exec"), vars(module))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is built where the extra `docs` is installed")
    pytest.importorskip("mkdocstrings", reason="the site is built where the extra `docs` is installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "LoRASettings" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def test_the_costs_of_the_methods_page_are_counted() -> None:
    shapes = {
        "bert": transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        "llama": transformers.LlamaConfig(),
    }
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    lines = page.partition("<!-- costs: start -->")[2].partition("<!-- costs: end -->")[0].strip().splitlines()[2:]
    assert len(lines) == 8
    for line in lines:
        name, *given = (cell.strip(" `") for cell in line.strip("|").split("|"))
        # Embeddings of tokens cannot be drawn from a model without weights.
        settings = {"prompt_tuning_init": "RANDOM"} if name == "PromptTuning" else {}
        for at, config in enumerate(shapes.values()):
            auto = transformers.AutoModelForCausalLM if at else transformers.AutoModel
            with torch.device("meta"):
                model = auto.from_config(config)
                total = sum(value.numel() for value in model.parameters())
                lit_peft.attach(model, getattr(lit_peft, f"{name}Settings")(**settings))
            trained = lit_peft.trainable_parameters(model)
            assert given[2 * at : 2 * at + 2] == [f"{trained:,}", f"{100 * trained / total:.3f}"], name
