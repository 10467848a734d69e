"""Gates on what a step costs, by deterministic counts: products and bytes, never seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lit_peft
from lit_peft.nn import LoRALinear

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
cases = pytest.importorskip("cases", reason="the benchmarks folder and peft are needed")
measure = pytest.importorskip("measure")

# The shape of DESIGN's measurement, each size divided by four or more.
SMALL = {"hidden": 128, "layers": 4, "vocabulary": 8000, "rows": 2, "length": 128, "r": 4}


def test_products_of_the_floor_and_the_adapters_alone() -> None:
    shape = cases.Shape(**SMALL)
    made = cases.runs(shape, full=False)
    assert cases.parity(made) <= 1e-5
    count = {name: measure.flops(step) for name, (_, step) in made.items()}
    adapters = 6 * lit_peft.trainable_parameters(made["lit_peft"][0]) * shape.rows * shape.length
    assert count["lit_peft"] <= 1.02 * (count["floor"] + adapters)
    assert count["lit_peft"] <= 0.85 * count["peft"]


class CountCalls(TorchDispatchMode):
    """Counts the operations of torch that run within it, those of the backward pass included."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("settings", "limit"), [({}, 12), ({"use_dora": True}, 40)], ids=["LoRA", "DoRA"])
def test_operations_of_each_adapted_layer(settings: dict[str, bool], limit: int) -> None:
    """On a GPU a step of a small batch takes as long as it takes to launch them. peft has 30 and 60."""
    frozen = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    x = torch.randn(2, 3, 8, requires_grad=True)
    counts = []
    for layer in (frozen, LoRALinear(frozen, **settings)):
        layer(x).sum().backward()  # from now on the gradients are there
        with CountCalls() as calls:
            layer(x).sum().backward()
        counts.append(calls.count)
    assert counts[1] - counts[0] <= limit, counts


@pytest.mark.parametrize(
    ("settings", "limit"),
    [({}, 0.65), ({"dtype": "bfloat16"}, 0.42), ({"dropout": 0.05}, 0.45)],
    ids=["fp32", "bf16", "dropout"],
)
def test_bytes_saved_for_the_backward_pass(settings: dict[str, object], limit: float) -> None:
    made = cases.runs(cases.Shape(**SMALL, **settings), full=False)
    saved = {name: measure.saved_bytes(step, model) for name, (model, step) in made.items()}
    assert saved["lit_peft"] <= limit * saved["peft"], saved


def test_the_top_quarter_of_the_layers() -> None:
    made = cases.runs(cases.Shape(**SMALL, top=1), full=False)
    assert cases.parity(made) <= 1e-5
    count = {name: measure.flops(made[name][1]) for name in ("lit_peft", "peft")}
    assert count["lit_peft"] <= 0.76 * count["peft"], count


@pytest.mark.parametrize(("supervised", "limit"), [(0.25, 0.35), (0.5, 0.46)])
def test_the_top_quarter_with_the_frozen_activations_kept(supervised: float, limit: float) -> None:
    # With half of the tokens supervised the head alone is 0.25 of peft's products, the two layers 0.20.
    made = cases.runs(cases.Shape(**SMALL | {"layers": 8}, supervised=supervised, top=2), full=False)
    uncached = measure.flops(made["peft"][1])
    cached, plain = made["lit_peft, cached"], made["lit_peft"]
    assert measure.flops(cached[1]) <= limit * uncached
    for mine, theirs in zip(measure.gradients(*cached), measure.gradients(*plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_logits_of_all_tokens_never_exist() -> None:
    shape = cases.Shape(**SMALL)
    (_, step) = cases.runs(shape, full=False)["lit_peft"]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == shape.vocabulary:
                seen.append(out.numel() // shape.vocabulary)
            return out

    with Watch():
        step().backward()
    assert seen and max(seen) <= shape.rows * shape.length * shape.supervised


def test_importing_takes_nothing_along() -> None:
    code = "import sys, torch; before = set(sys.modules); import lit_peft; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = done.stdout.split()
    assert all(name.startswith("lit_peft") for name in new) and len(new) < 10


def test_compiling_breaks_no_graph_of_ours() -> None:
    shape = cases.Shape(hidden=32, layers=2, vocabulary=50, rows=2, length=8, r=2)
    made = cases.runs(shape, full=False)
    model = made["lit_peft"][0]
    found = torch._dynamo.explain(model)(**shape.batch())
    torch._dynamo.reset()
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    plain = measure.gradients(*made["lit_peft"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours = measure.gradients(model, lambda: compiled(**shape.batch()).loss)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.heavy
def test_the_benchmark_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = pytest.importorskip("step")
    chosen = ["V=32k", "AdapterH, reduction 16"]
    command = ["step.py", "--small", "--rounds", "1", "--no-memory", "--out", str(tmp_path), "--cases"]
    monkeypatch.setattr(sys, "argv", [*command, *chosen])
    threads = torch.get_num_threads()
    step.main()
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [result["case"] for result in results] == chosen
    assert results[0]["gradient_difference"] <= 1e-5 and results[0]["ways"]["peft"]["ratio"] == 1
    assert len((tmp_path / "step.md").read_text().splitlines()) == 2 + 4 + 3
    assert (tmp_path / "step.svg").stat().st_size > 0


def test_the_page_holds_the_results() -> None:
    page = pytest.importorskip("page")
    text = (page.DOCS / "speed.md").read_text(encoding="utf-8")
    assert page.filled(text) == text, "run python benchmarks/page.py"
