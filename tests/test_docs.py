"""The Python examples of the README and the documentation run as they stand, on a tiny model; the site builds."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import speech_example
import torch
import transformers
from vision_models import model_of, picture, processor_of

import lit_peft
from lit_peft.cli import main
from lit_peft.commands.compare import read_plan
from lit_peft.methods.registry import METHODS, settings_class

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
def test_example(code: str, decoder: Path, encoder: Path, script_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = script_folder
    rows = [f'{{"text": "{" ".join(words)}"}}' for words in itertools.permutations(("good", "film", "the", "story"))]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    pairs = [row.replace('"text"', '"prompt"')[:-1] + ', "chosen": "great", "rejected": "bad"}' for row in rows]
    (tmp_path / "preferences.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(decoder)
    (tmp_path / "path" / "to" / "encoder").symlink_to(encoder)
    if "adapters/{language}" in code:  # what a run of task masked_lm writes
        for language in ("english", "turkish"):
            model = transformers.AutoModelForMaskedLM.from_pretrained("path/to/encoder")
            lit_peft.attach(model, lit_peft.AdapterPSettings(reduction_factor=2))
            lit_peft.save_adapter(model, f"adapters/{language}")
    if "path/to/vision" in code:
        picture(0).save("a.png")
        processor_of("llava").save_pretrained("path/to/vision")
        model = model_of("llava")
        model.save_pretrained("path/to/vision")
        lit_peft.save_adapter(lit_peft.attach(model, lit_peft.LoRASettings()), "path/to/adapter")
    if "speech_example" in code:
        speech_example.save_recordings(tmp_path / "speech_example", 6)
        speech_example.save_whisper(tmp_path / "speech_example" / "whisper", width=16)
    code = code.replace("max_steps=100", "max_steps=2")
    module = types.ModuleType("__main__")  # classes of a script can be pickled
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(code, "example", "exec"), vars(module))


def commands(page: str) -> list[str]:
    """The `lit-peft` commands of a page, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("lit-peft ")]


def test_the_commands_of_the_guide_run_one_after_the_other(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    rows = [{"text": " ".join(words)} for words in itertools.permutations(("good", "film", "the", "story"))]
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = "lit_peft_runs/version_0"
    places = {
        "BASE": str(decoder),
        "FILE": "texts.jsonl",
        "FOLDER": f"{run}/adapter",
        "CKPT": f"{run}/checkpoints/last.ckpt",
        "OUT": "merged",
        "NEW": "exported",
        "GGUF": "gguf",
        "100": "2",
    }
    found = commands("docs/guide.md")
    assert {line.split()[1] for line in found} == set(
        "fit init doctor info generate merge export push serve".split()  # noqa: SIM905
    )
    for line in found:
        arguments = [places.get(word, word) for word in shlex.split(line)[1:]]
        if "--help" in arguments:
            with pytest.raises(SystemExit) as done:
                main(arguments)
            assert done.value.code == 0, line
        else:
            assert main(arguments) == 0, (line, capsys.readouterr().err)
    assert Path("merged/config.json").is_file() and Path("exported/adapter_config.json").is_file()
    assert "class_path: LoRA" in Path("config.yaml").read_text()


@pytest.mark.parametrize("line", [*commands("README.md"), *commands("docs/index.md")])
def test_the_command_of_the_first_page_is_read(
    line: str, decoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tests/test_configs.py and tests/test_compare.py run what these commands run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    _, command, *arguments = shlex.split(line.partition(" > ")[0].replace("BASE", str(decoder)))
    if command == "compare":
        assert read_plan(arguments)[0].methods
    elif "mine.yaml" not in arguments:
        with pytest.raises(SystemExit) as done:
            main([command, *arguments, *([] if "--print_config" in arguments else ["--print_config"])])
        assert done.value.code in (0, None) and "class_path: " in capsys.readouterr().out


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
    """`LIT_PEFT_WRITE_COSTS=1` writes the table; its last column is kept, and says "all" for a new method."""
    shapes = {
        "bert": transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        "llama": transformers.LlamaConfig(),
    }
    page = ROOT / "docs" / "methods.md"
    start, end = "<!-- costs: start -->\n", "<!-- costs: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    table, _, after = rest.partition(end)
    head, rule, *lines = table.splitlines()
    in_folder = {line.split("`")[1]: line.split("|")[-2].strip() for line in lines}
    counted = []
    for name in (name for name, method in METHODS.items() if not method.baseline):
        # Embeddings of tokens cannot be drawn from a model without weights.
        settings = {"prompt_tuning_init": "RANDOM"} if name == "PromptTuning" else {}
        cells = [f"`{name}`"]
        for config in shapes.values():
            auto = transformers.AutoModelForCausalLM if config.model_type == "llama" else transformers.AutoModel
            with torch.device("meta"):
                model = auto.from_config(config)
                total = sum(value.numel() for value in model.parameters())
                lit_peft.attach(model, settings_class(name)(**settings))
            trained = lit_peft.trainable_parameters(model)
            cells += [f"{trained:,}", f"{100 * trained / total:.3f}"]
        counted.append(f"| {' | '.join([*cells, in_folder.get(name, 'all')])} |")
    written = "\n".join([head, rule, *counted]) + "\n"
    if os.environ.get("LIT_PEFT_WRITE_COSTS"):
        page.write_text(before + start + written + end + after, encoding="utf-8")
    else:
        assert table == written, "run `LIT_PEFT_WRITE_COSTS=1 python -m pytest tests/test_docs.py -k costs`"
