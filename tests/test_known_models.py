"""Every text model type of transformers is known: it has a row in docs/support.md, or a reason for having none."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from sweep import DOCS, END, START
from sweep_models import LISTS, SEVERAL, build, left_out, smaller
from transformers import CONFIG_MAPPING

from lit_peft.models.architectures import ARCHITECTURES, layer_stacks
from lit_peft.util.errors import LitPeftError

SECTION = DOCS.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
ROWS = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if re.match(r"\| .+ \((en|de)coder", line)]
TRIED = {cells[0].partition(" (")[0] for cells in ROWS}
NOTES = dict(re.findall(r"^(\d+)\. (.+)$", SECTION, re.MULTILINE))


@pytest.mark.parametrize("kind", LISTS)
def test_model_types_without_a_row_have_a_reason(kind: str) -> None:
    unknown = {name for name in LISTS[kind][1] if name not in TRIED and left_out(name) is None}
    assert not unknown, (
        "transformers has new model types: run tools/sweep.py and write docs/support.md, name their layers in "
        "lit_peft/models/architecture_table.py if their structure is not recognized, or give a reason in "
        "tools/sweep_models.py: LEFT_OUT"
    )


def test_no_model_type_has_both_a_row_and_a_reason_for_none() -> None:
    assert not {name for name in TRIED if name in CONFIG_MAPPING and left_out(name) is not None}


def test_what_the_page_says_of_the_models_without_a_row_is_true() -> None:
    listed = {
        name: reason
        for names, reason in re.findall(r"^- (`.+`): (.+)\.$", SECTION, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert listed
    assert {
        name: reason for name, reason in listed.items() if name in CONFIG_MAPPING and left_out(name) != reason
    } == {}
    # A language model in a model that combines several has a row of its own, if it has a model type.
    for name in (name for name, reason in listed.items() if reason == SEVERAL and name in CONFIG_MAPPING):
        text = CONFIG_MAPPING[name].sub_configs.get("text_config")
        kind = getattr(text, "model_type", "")
        assert not kind or kind in TRIED or kind not in LISTS["decoder"][1], name


def test_the_page_counts_its_rows_and_gives_a_reason_for_each_no() -> None:
    cells = [cell for row in ROWS for cell in row[1:]]
    assert len(ROWS) >= 200
    found = re.search(r"([\d,]+) of ([\d,]+) pairs run, (\d+) are refused, none fails", SECTION)
    assert found is not None
    passed, total, refused = (int(number.replace(",", "")) for number in found.groups())
    assert (passed, total, refused) == (cells.count("yes"), len(cells), len(cells) - cells.count("yes"))
    reasons = {re.fullmatch(r"no \[(\d+)\]", cell)[1] for cell in cells if cell != "yes"}  # type: ignore[index]
    assert reasons == set(NOTES)
    assert all(re.search(r": (use|name|set) ", note) for note in NOTES.values()), "each says what to do instead"


def test_the_table_names_model_types_that_exist() -> None:
    newest = max(map(int, re.findall(r"transformers (?:\d+)\.(\d+)", SECTION)))
    if int(transformers.__version__.split(".")[1]) < newest:
        pytest.skip("an older transformers lacks some")
    assert set(ARCHITECTURES) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize(
    "copied", ["jamba", "lfm2", "qwen3_next", "granitemoehybrid", "nemotron_h", "mamba2", "llama4_text", "gte"]
)
def test_layers_of_a_new_model_type_are_recognized_by_structure(copied: str) -> None:
    model = build(copied, "encoder" if copied == "gte" else "decoder")
    known = [layer.architecture for stack in layer_stacks(model) for layer in stack]
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.model_type = "newer_than_the_table"
    assert [layer.architecture for stack in layer_stacks(model) for layer in stack] == known


def test_layers_of_an_unknown_structure_are_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    with pytest.raises(LitPeftError, match="no transformer layers of a known structure"):
        layer_stacks(Odd())


def test_configs_inside_a_config_are_made_smaller_too() -> None:
    default = transformers.AutoConfig.for_model("llama4").to_dict()
    assert smaller("llama4", default)["text_config"]["hidden_size"] == 32
