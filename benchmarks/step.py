"""What a training step costs: lit_peft, the installed peft, full fine-tuning, and the arithmetic floor.

    python benchmarks/step.py                 # all of it: half an hour on one thread
    python benchmarks/step.py --small --rounds 3 --out runs/benchmark     # a shape a sixteenth as large: two minutes
    python benchmarks/step.py --cases "V=32k"

One process a case, same base, same batch, steps in turn; before each timing the gradients of the pair are compared.
Each case is written to OUT/step.json as soon as it is done, beside those that are there, and all are printed as a table
and drawn. `python benchmarks/page.py` puts them into docs/speed.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import page
import torch
from cases import METHODS, Runs, Shape, method_runs, parity, runs
from measure import flops, interleaved, peak_mb, ratio, saved_bytes

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "V=32k": Shape(),
    "V=128k": Shape(vocabulary=128_000),
    "V=64k, half the width": Shape(hidden=256, vocabulary=64_000),  # the head's share of V=128k, a quarter of its cost
    "V=32k, all tokens supervised": Shape(supervised=1.0),
    "V=32k, bf16": Shape(dtype="bfloat16"),
    "V=32k, dropout 0.05": Shape(dropout=0.05),
    "V=32k, top quarter": Shape(top=2),
    # Half the width and the vocabulary: the head keeps its share.
    **dict.fromkeys(METHODS, Shape(hidden=256, vocabulary=16_000)),
}


def shape_of(case: str, small: bool) -> Shape:
    """The shape of a case; a small one has a quarter of the width, layers and tokens."""
    shape = SHAPES[case]
    if small:
        sizes = {"hidden": 128, "layers": 4, "vocabulary": shape.vocabulary // 4, "length": 64, "r": 4}
        shape = replace(shape, **sizes, top=None if shape.top is None else 1)  # type: ignore[arg-type]
    return shape


def measured(case: str, rounds: int, small: bool) -> dict[str, Any]:
    """Counts and times of every way of a case."""
    shape = shape_of(case, small)
    made: Runs = method_runs(shape, case) if case in METHODS else runs(shape)
    result: dict[str, Any] = {"case": case, "shape": asdict(shape), "trained": _trained(made["lit_peft"][0])}
    result["gradient_difference"] = parity(made) if "peft" in made else None
    tolerance = 1e-5 if shape.dtype == "float32" else 5e-2
    assert (result["gradient_difference"] or 0) <= tolerance, result
    result["ways"] = {
        way: {"gflop": flops(step) / 1e9, "saved_mb": saved_bytes(step, model) / 1e6}
        for way, (model, step) in made.items()
    }
    if rounds:
        seconds = interleaved({way: step for way, (_, step) in made.items()}, rounds)
        base = ["peft"] if "peft" in made else ["floor", "matmuls"]
        for way, values in result["ways"].items():
            values["ms"] = 1e3 * statistics.median(clock for clock, _ in seconds[way])
            values["cpu_ms"] = 1e3 * statistics.median(processor for _, processor in seconds[way])
            for which, name in enumerate(("", "cpu_")):
                values[f"{name}ratio"] = ratio(seconds, way, *base, which=which)
                values[f"{name}of_floor"] = ratio(seconds, way, "floor", which=which)
    return result


def _trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak(case: str, way: str, small: bool) -> float:
    """Increase of the peak resident memory in MB over two steps, in a process of its own."""
    command = [sys.executable, __file__, "--peak", case, way, *(["--small"] if small else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak(shape: Shape, way: str) -> float:
    step = runs(shape, only=way)[way][1]
    return peak_mb(lambda: [step().backward() for _ in range(2)])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; 0: counts only")
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="CASE", help=str([*SHAPES]))
    parser.add_argument("--small", action="store_true", help="a sixteenth of the shape: quick, and says less of time")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process for each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        case, way = options.peak
        print(_peak(shape_of(case, options.small), way))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "step.json"
    results = json.loads(file.read_text())["results"] if file.exists() else []
    machine = {"torch": torch.__version__, "threads": options.threads, "machine": platform.machine()}
    for case in options.cases:
        # Models and their hooks hold each other.
        gc.collect()
        result = measured(case, options.rounds, options.small)
        done = {**{each["case"]: each for each in results}, case: result}
        results = [done[name] for name in SHAPES if name in done]
        file.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
        if case not in METHODS and not options.no_memory and sys.platform == "linux":
            for way, values in result["ways"].items():
                values["peak_mb"] = peak(case, way, options.small)
            file.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
        print(page.step_table([result]), flush=True)
    (options.out / "step.md").write_text(page.step_table(results) + "\n")
    page.step_plot(results, options.out / "step.svg")


if __name__ == "__main__":
    main()
