"""What cannot be written ends in one sentence, and leaves nothing behind."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch
from limits import cost_of

import lit_peft
from lit_peft.cli import main


def test_export_onto_a_full_disk(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = lit_peft.LoRA(base=str(decoder), r=2)
    module.configure_model()
    state = {"state_dict": module.state_dict(), "hyper_parameters": {"base": str(decoder), "r": 2}}
    torch.save(state, tmp_path / "x.ckpt")
    command = ["export", "--ckpt_path", str(tmp_path / "x.ckpt"), "--method", "LoRA", "--output"]

    def full() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return main([*command, str(tmp_path / "out")])

    cost = cost_of(full, 20, 2**31)
    assert (cost.result, cost.message) == ("done", "2"), cost
    assert main([*command, str(tmp_path / "x.ckpt" / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    assert "could not be written" in capsys.readouterr().err


def test_a_template_that_the_sandbox_refuses(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(decoder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    assert main(["generate", "--base", str(tmp_path / "base"), "--prompt", "a film", "--chat"]) == 2
    assert "the chat template of the tokenizer cannot be applied" in capsys.readouterr().err
