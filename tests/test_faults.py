"""A slice of the campaign of killed processes and full disks, and the sentence for a file that cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lit_peft
from lit_peft.cli import main
from lit_peft.util.write_errors import write_error

FULL = Path("/dev/full")  # every write to it fails with ENOSPC


@pytest.mark.skipif(not FULL.exists(), reason="Linux has /dev/full")
def test_a_full_disk_is_recognized_whichever_library_wrote(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as python:
        FULL.write_text("x")
    # The library that closes its file afterwards hides the cause behind another error.
    with pytest.raises(ValueError, match="closed") as hidden:
        try:
            raise python.value
        finally:
            raise ValueError("I/O operation on closed file")
    said = write_error(python.value)
    assert said is not None and "the disk is full" in said and write_error(hidden.value) == said
    (tmp_path / "link.safetensors").symlink_to(FULL)
    with pytest.raises(Exception, match="os error") as rust:
        save_file({"x": torch.zeros(9)}, tmp_path / "missing" / "x.safetensors")
    assert write_error(rust.value) is None  # os error 2: there is no such folder, which is a fault of another kind
    assert "is full" in str(write_error(RuntimeError("Error while serializing: I/O error (os error 28)")))
    assert write_error(KeyError("x")) is None and write_error(FileNotFoundError(2, "No such file")) is None


def test_a_command_that_may_not_write_says_so(decoder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    import transformers

    model = lit_peft.attach(transformers.AutoModelForCausalLM.from_pretrained(decoder), lit_peft.LoRASettings(r=2))
    lit_peft.save_adapter(model, tmp_path / "adapter")
    arguments = ["merge", "--base", str(decoder), "--adapter", str(tmp_path / "adapter"), "--output", "/sys/merged"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "lit-peft: error: A file could not be written to /sys/" in said and "Traceback" not in said
    monkeypatch.setenv("LIT_PEFT_DEBUG", "1")
    with pytest.raises(OSError, match="/sys/"):
        main(arguments)


@pytest.mark.heavy
def test_a_slice_of_the_fault_campaign_finds_nothing(tmp_path: Path) -> None:
    """The whole: `python tests/fault_campaign.py --kills 200 --full_disks 50`."""
    probe = "import os; raise SystemExit(os.getuid() and os.system('unshare --user --map-root-user --mount true') != 0)"
    disks = 10 if subprocess.run([sys.executable, "-c", probe]).returncode == 0 else 0
    script = Path(__file__).with_name("fault_campaign.py")
    command = [sys.executable, str(script), "--kills", "20", "--full_disks", str(disks), "--servers", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
