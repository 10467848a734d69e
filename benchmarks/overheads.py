"""What surrounds the arithmetic: `python benchmarks/overheads.py` writes benchmarks/results/overheads.json.

Injection, import, Lightning's Trainer over a bare loop, torch.compile, and decoding with an adapter that is not merged.
Ratios are medians over interleaved rounds, by the processor's clock. `python benchmarks/page.py` puts them into
docs/speed.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from cases import LINEAR, Shape
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import LoRASettings, supervised_loss

RESULTS = Path(__file__).parent / "results"
ALL = LoRASettings(r=16, lora_alpha=32, target_modules=LINEAR)
Figures = dict[str, float]


def injection(rounds: int) -> Figures:
    """Milliseconds of `attach`: on all linear layers of the benchmark's shape, and of a 7B model on meta."""
    model = Shape().base()
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig())
    found: Figures = {}
    for name, each in (("injection_ms", model), ("injection_7b_meta_ms", large)):
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            lit_peft.attach(each, ALL)
            seconds.append(time.process_time() - start)
            lit_peft.detach(each)
        found[name] = 1e3 * statistics.median(seconds)
    return found


def importing(rounds: int) -> Figures:
    """Milliseconds that `import lit_peft` adds to `import torch`, each in a new process."""
    code = "import torch, time; s = time.process_time(); import lit_peft; print(time.process_time() - s)"
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(rounds)]
    return {"import_ms": 1e3 * statistics.median(float(each.stdout) for each in done)}


class _Module(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with supervised_loss(self.model):
            loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=4)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(parameter for parameter in self.parameters() if parameter.requires_grad)


def trainer(rounds: int, steps: int = 25) -> Figures:
    """What Trainer and LightningModule add to a step, in ms and by the step of a bare loop, LoRA at batch 4 × 256.

    What they add does not depend on the model: it is measured on a tiny one, where it shows above the noise.
    """
    tiny, real = Shape(hidden=64, layers=1, vocabulary=100), Shape()
    module = _Module(lit_peft.attach(tiny.base(), ALL))
    data = DataLoader([tiny.batch()] * (steps + 1), batch_size=None)
    times: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            times.append(time.process_time())

    def with_trainer() -> None:
        quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[Clock()], **quiet).fit(module, data)

    def bare(module: _Module, data: Iterable[Any]) -> None:
        optimizer = module.configure_optimizers()
        for batch in data:
            optimizer.zero_grad()
            with supervised_loss(module.model):
                loss = module.model(**batch).loss
            loss.backward()
            optimizer.step()
            times.append(time.process_time())

    def step(run: Callable[[], None]) -> float:
        times.clear()
        run()
        return statistics.median(b - a for a, b in pairwise(times))

    added = statistics.median(step(with_trainer) - step(lambda: bare(module, data)) for _ in range(rounds))
    whole = _Module(lit_peft.attach(real.base(), ALL))
    seconds = step(lambda: bare(whole, [real.batch()] * 3))
    return {"trainer_adds_ms": 1e3 * added, "trainer_ratio": 1 + added / seconds}


def compiled(rounds: int) -> Figures:
    """Graph breaks of the model with LoRA and without, and the time of a compiled training step by an eager one."""
    shape = Shape(layers=2, vocabulary=2000)
    base = shape.base()
    ours = lit_peft.attach(copy.deepcopy(base), ALL)
    batch = shape.batch()
    breaks = [torch._dynamo.explain(model)(**batch).graph_break_count for model in (base, ours)]
    torch._dynamo.reset()
    quick = torch.compile(ours)
    for _ in range(2):
        quick(**batch).loss.backward()
    time_of = {
        name: (lambda model=model: _seconds(lambda: model(**batch).loss.backward()))
        for name, model in (("compiled", quick), ("eager", ours))
    }
    return {
        "graph_breaks_of_base": breaks[0],
        "graph_breaks": breaks[1],
        "compiled_ratio": _ratio(time_of["compiled"], time_of["eager"], rounds),
    }


def decoding(rounds: int, tokens: int = 24) -> Figures:
    """Speed of greedy decoding with an unmerged LoRA by the base's: r=8 on query and value, and r=16 everywhere."""
    base = Shape().base().eval()
    prompt = Shape(rows=1, length=32).batch()["input_ids"]
    settings: Any = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def decode(model: Any) -> float:
        with torch.no_grad():
            return _seconds(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))

    found: Figures = {}
    for name, each in (("decode_qv_ratio", LoRASettings(r=8)), ("decode_all_ratio", ALL)):
        adapted = lit_peft.attach(copy.deepcopy(base), each).eval()
        for model in (base, adapted):
            decode(model)
        found[name] = _ratio(lambda: decode(base), lambda adapted=adapted: decode(adapted), rounds)
    return found


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _ratio(one: Callable[[], float], other: Callable[[], float], rounds: int) -> float:
    return statistics.median(one() / other() for _ in range(rounds))


def main() -> None:
    """Run the command line."""
    parts = {part.__name__: part for part in (injection, importing, trainer, compiled, decoding)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "overheads.json"
    figures: Figures = json.loads(file.read_text()) if file.exists() else {}
    for name in options.parts:
        found = parts[name](options.rounds)
        print(name, found, flush=True)
        figures |= found
        file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
