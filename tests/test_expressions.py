"""Regular expressions over module names: what they match, and that none takes long."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from models import make
from torch import nn

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.formats.untrusted import read_json, read_tensors
from lit_peft.methods.patterns import first_fitting
from lit_peft.methods.targets import find_targets
from lit_peft.util.expressions import Expressions, check_expression

NAMES = [f"model.layers.{index}.self_attn.{name}_proj" for index in range(40) for name in "qkvo"]
# Each takes exponential time in Python's own module.
HOSTILE = [
    r"(\w|\w\w|.)+!",
    r"(?:.?){30}!",
    ".{1,16}" * 14,
    r"(a+)+[!?]",
    r"(?:\w|\w\w|.)+[!?]",
    r"(?:(?:x?){300}){300}",
]
VALID = [
    r".*\.(q|v)_proj",
    r"model\.layers\.[0-3]\..*",
    r"model\.layers\.\d{1,2}\.self_attn\.k_proj",
    r"(?i).*Q_PROJ",
    "a|b",
]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
def test_no_expression_of_a_foreign_folder_takes_long(field: str, pattern: str, tmp_path: Path) -> None:
    folder = lit_peft.save_adapter(lit_peft.attach(make("llama"), LoRASettings(r=2)), tmp_path / "a", format="peft")
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings[field] = {pattern: 4} if field == "rank_pattern" else pattern
    settings["layers_to_transform"] = [0] if field == "layers_pattern" else None
    file.write_text(json.dumps(settings))
    start = time.process_time()
    try:
        lit_peft.load_adapter(make("llama"), folder)
    except LitPeftError as error:
        assert len(str(error)) < 600
    assert time.process_time() - start < 2


def test_many_slow_expressions_share_the_time() -> None:
    patterns = [rf"(\w|\w\w|.)+[!?]{number}" for number in range(50)]
    start = time.process_time()
    with pytest.raises(LitPeftError, match="which takes too long"):
        first_fitting(patterns, NAMES)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("pattern", VALID)
def test_expressions_match_as_pythons_own_do(pattern: str) -> None:
    expressions = Expressions("target_modules")
    found = [name for name in NAMES if expressions.fullmatch(pattern, name)]
    assert found == [name for name in NAMES if re.fullmatch(pattern, name)]


def test_a_rank_for_every_module_by_its_name_is_quick() -> None:
    names = [f"model.layers.{index}.{name}" for index in range(100) for name in "abcdefgh"]
    start = time.process_time()
    assert first_fitting([name.replace(".", r"\.") for name in names], names).keys() == set(names)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("(", "regular expression"), ("a" * 10_001, "10,001 characters"), ("(?:(?:a?){999}){999}", "repeats its parts")],
    ids=["invalid", "long", "counts"],
)
def test_expressions_that_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(LitPeftError, match=words):
        check_expression("target_modules", pattern)


def test_the_lists_of_layers_are_found_by_their_pattern() -> None:
    model = nn.ModuleDict(
        {name: nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for name in ("layers", "blocks", "h")}
    )
    found = {
        pattern: find_targets(model, "all-linear", layers_to_transform=1, layers_pattern=pattern)
        for pattern in (None, "layers", "(layers|h)", "layers|h", "h|blocks")
    }
    assert found[None] == ["layers.1", "blocks.1", "h.1"]
    assert found["layers"] == ["layers.1"] and found["h|blocks"] == ["blocks.1", "h.1"]
    assert found["(layers|h)"] == found["layers|h"] == ["layers.1", "h.1"]


def test_repeated_keys_are_found_in_one_pass(tmp_path: Path) -> None:
    count = 40_000
    keys = ", ".join(f'"k{number}": 1' for number in [*range(count), count - 1])
    (tmp_path / "adapter_config.json").write_text(f"{{{keys}}}")
    header = f"{{{keys}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    start = time.process_time()
    with pytest.raises(LitPeftError, match="the key 'k39999' occurs twice"):
        read_json(tmp_path, "adapter_config.json")
    with pytest.raises(LitPeftError, match="the key 'k39999' occurs twice"):
        read_tensors(tmp_path, "a.safetensors")
    assert time.process_time() - start < 2


def test_a_folder_with_many_tensors_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"t{number}": torch.tensor([float(number)]) for number in range(2000)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path, "a.safetensors")
    assert found is not None and found.keys() == tensors.keys()
