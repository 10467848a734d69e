"""What a training step costs: lit_peft, the installed peft, full fine-tuning, and the arithmetic floor.

    python benchmarks/step.py --out benchmarks/results     # JSON, a Markdown table and a plot

One process, same base, same batch, steps in turn; before each timing, ours and peft's gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import Shape, parity, runs
from measure import flops, interleaved, ratio, saved_bytes

SHAPES = {
    "V=32k": Shape(),
    "V=128k": Shape(vocabulary=128_000),
    "V=32k, all tokens supervised": Shape(supervised=1.0),
    "V=32k, bf16": Shape(dtype="bfloat16"),
    "V=32k, dropout 0.05": Shape(dropout=0.05),
    "V=32k, top quarter": Shape(top=2),
}


def measured(name: str, rounds: int, memory: bool) -> dict[str, Any]:
    """Counts and times of every way at one shape."""
    shape = SHAPES[name]
    made = runs(shape)
    result: dict[str, Any] = {"case": name, "shape": asdict(shape)}
    # Dropout draws other masks than peft, and bf16 rounds elsewhere: there is no parity to check.
    result["gradient_difference"] = None if shape.dropout or shape.dtype != "float32" else parity(made)
    assert result["gradient_difference"] is None or result["gradient_difference"] <= 1e-5, result
    seconds = interleaved({way: step for way, (_, step) in made.items()}, rounds) if rounds else {}
    result["ways"] = {
        way: {
            "gflop": flops(step) / 1e9,
            "saved_mb": saved_bytes(step, model) / 1e6,
            **({"peak_mb": peak(name, way)} if memory else {}),
            **(
                {
                    "ms": 1e3 * statistics.median(seconds[way]),
                    "of_peft": ratio(seconds, way, "peft"),
                    "of_floor": ratio(seconds, way, "floor"),
                }
                if rounds
                else {}
            ),
        }
        for way, (model, step) in made.items()
    }
    return result


def peak(name: str, way: str) -> float:
    """Increase of the peak resident memory in MB over two steps, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _peak(name: str, way: str) -> None:
    step = runs(SHAPES[name], only=way)[way][1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    columns = {"gflop": "GFLOP", "saved_mb": "saved MB", "peak_mb": "peak MB", "ms": "ms"}
    columns |= {"of_peft": "× peft's time", "of_floor": "× the floor's"}
    used = [key for key in columns if key in next(iter(results[0]["ways"].values()))]
    lines = [f"| case | run | {' | '.join(columns[key] for key in used)} |", "|---|---|" + "---:|" * len(used)]
    for result in results:
        for way, values in result["ways"].items():
            shown = [f"{values[key]:.2f}" if key.startswith("of_") else f"{values[key]:.1f}" for key in used]
            lines.append(f"| {result['case']} | {way} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Draw every quantity relative to peft's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = {
        "gflop": "products",
        "saved_mb": "bytes saved for backward",
        "peak_mb": "peak memory",
        "ms": "time of a step",
    }
    used = [key for key in keys if key in results[0]["ways"]["peft"]]
    figure, axes = plt.subplots(1, len(used), figsize=(4.2 * len(used), 4), squeeze=False)
    ways = list(results[0]["ways"])
    for axis, key in zip(axes[0], used, strict=True):
        for at, way in enumerate(ways):
            heights = [result["ways"][way][key] / result["ways"]["peft"][key] for result in results]
            axis.bar([case + 0.2 * at for case in range(len(results))], heights, 0.2, label=way)
        axis.set_xticks([case + 0.3 for case in range(len(results))])
        axis.set_xticklabels([result["case"] for result in results], rotation=30, ha="right", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_title(f"{keys[key]}, peft = 1", fontsize=9)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; 0: counts only")
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, a process for each run")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        _peak(*options.peak)
        return
    results = [measured(name, options.rounds, options.memory) for name in options.cases]
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    (options.out / "step.json").write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
    (options.out / "step.md").write_text(table(results) + "\n")
    plot(results, options.out / "step.png")
    print(table(results))


if __name__ == "__main__":
    main()
