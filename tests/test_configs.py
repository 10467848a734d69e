"""Every ready configuration runs, for two steps, offline; those on hub models are parsed."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from lit_peft.cli import main

# Those of `lit-peft compare` are no configurations of one run.
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if not path.stem.startswith("compare")
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    if not re.search(r"base: pkg:", text):
        with pytest.raises(SystemExit) as done:
            main(["fit", "--config", str(config), "--print_config"])
        assert done.value.code in (0, None)
        return
    for name in sorted(set(re.findall(r"pkg:([\w-]+)", text))):
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
    limits = ["--data.limit_train", "64", "--data.limit_validation", "32"]
    quick = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1.0", "--trainer.default_root_dir", "runs"]
    assert (
        main(["fit", "--config", str(config), *given, *limits, *quick, "--trainer.enable_progress_bar", "false"]) == 0
    )
    assert "train_loss" in capsys.readouterr().out


def test_every_method_has_one() -> None:
    import lit_peft.modules
    from lit_peft.training.module import BaseLM

    text = "\n".join(path.read_text(encoding="utf-8") for path in CONFIGS)
    for name, kind in vars(lit_peft.modules).items():
        if isinstance(kind, type) and issubclass(kind, BaseLM) and kind is not BaseLM:
            baseline = name in ("FullFineTuning", "HeadOnly")
            assert baseline or re.search(rf"class_path: {name}\b", text), f"no configuration for {name}"
