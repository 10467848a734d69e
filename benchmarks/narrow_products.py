"""The rate of LoRA's own products beside those of the layers they adapt: what a step can take at the least.

    python benchmarks/narrow_products.py

Shape of `cases.Shape`, LoRA r=16 on all linear layers, one thread, the processor's time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from cases import Shape

import lit_peft
from lit_peft.nn import LoRALinear

ROUNDS, R = 9, 16


def main() -> None:
    torch.set_num_threads(1)
    shape = Shape()
    tokens = shape.rows * shape.length
    model = lit_peft.attach(shape.base(), lit_peft.LoRASettings(r=R, target_modules="all-linear"))
    widths = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, LoRALinear)]
    weights = {pair: torch.randn(pair) for pair in set(widths)}
    inputs = [(torch.randn(tokens, d_in), torch.randn(tokens, d_out)) for d_in, d_out in widths]
    factors = [(torch.randn(R, d_in), torch.randn(d_out, R)) for d_in, d_out in widths]

    def narrow() -> None:
        for (x, grad), (a, b) in zip(inputs, factors, strict=True):
            low = torch.mm(x, a.T)
            torch.addmm(grad, low, b.T)  # onto the layer's output
            grad_low = torch.mm(grad, b)
            torch.addmm(x, grad_low, a)  # onto the input's gradient
            torch.mm(grad_low.T, x)
            torch.mm(grad.T, low)

    def wide() -> None:
        for (x, grad), pair in zip(inputs, widths, strict=True):
            torch.mm(x, weights[pair])
            torch.mm(grad, weights[pair].T)

    products = {
        "narrow": (narrow, 6 * sum(tokens * R * (d_in + d_out) for d_in, d_out in widths)),
        "wide": (wide, 4 * sum(tokens * d_in * d_out for d_in, d_out in widths)),
    }
    for name, (run, count) in products.items():
        seconds = _seconds(run)
        print(f"{name}: {seconds * 1e3:.0f} ms, {count / 1e9:.1f} GFLOP, {count / seconds / 1e9:.0f} GFLOP/s")


def _seconds(run: Callable[[], None]) -> float:
    run()
    taken = []
    for _ in range(ROUNDS):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
