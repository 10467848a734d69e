"""The sweep over model types finds what its page says."""

from __future__ import annotations

import pytest
from sweep import DOCS, END, METHODS, START, answers, check, general, resting_parameters, sound
from sweep_models import build

TABLE = DOCS.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines()


def cells(model_type: str, kind: str) -> dict[str, str]:
    row = next(line for line in TABLE if line.startswith(f"| {model_type} ({kind}) |"))
    return dict(zip(METHODS, (cell.strip() for cell in row.split("|")[2:-1]), strict=True))


@pytest.mark.parametrize(
    ("model_type", "kind", "method"),
    [
        ("gemma3_text", "decoder", "PromptTuning"),
        ("falcon_h1", "decoder", "PTuning"),
        ("deepseek_v3", "decoder", "PTuningV2"),
        ("xlnet", "decoder", "PromptTuning"),
        ("ibert", "encoder", "AdapterP"),
        ("umt5", "encoder-decoder", "PrefixTuning"),
    ],
)
def test_a_cell_of_the_page_is_what_runs(model_type: str, kind: str, method: str) -> None:
    base = build(model_type, kind)
    resting = resting_parameters(base, kind)
    found = check(base, kind, method, sound(answers(base, kind), 2e-5), resting)
    said = cells(model_type, kind)[method]
    if found == "yes":
        assert said == "yes"
    else:
        number = said.removeprefix("no [").removesuffix("]")
        assert f"{number}. {general(found.removeprefix('no: '))}" in TABLE
