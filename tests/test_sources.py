"""Naming a base model: hub id, folder, packaged model; and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_peft import LitPeftError
from lit_peft.sources import resolve_base


def test_local_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(LitPeftError):
        resolve_base(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    source = resolve_base(str(tmp_path))
    assert source.is_local and Path(source.path) == tmp_path


def test_hub_id_is_left_alone() -> None:
    source = resolve_base("organization/model")
    assert source.path == "organization/model" and not source.is_local


def test_missing_folder_and_package() -> None:
    with pytest.raises(LitPeftError):
        resolve_base("./no/such/folder")
    with pytest.raises(LitPeftError, match="pip install"):
        resolve_base("pkg:surely-not-an-installed-package")
