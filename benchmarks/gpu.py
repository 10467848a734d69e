"""What training and decoding cost on a GPU, beside peft, Liger and Unsloth, in one command of at most five minutes.

    python benchmarks/gpu.py                            # a Llama of 1B, in about five minutes
    python benchmarks/gpu.py --shape 8b --groups steps floors
    python benchmarks/gpu.py --shape tiny --backend eager --rounds 1 --out runs/gpu       # to try it out on a CPU

Each row is a model of its own with the same weights, the same adapters and the same batch; it takes three steps of
AdamW first, of which the first compiles. The losses of the first and the third step stand beside each time, and how far
those are apart that should agree is said at the end. Each row is written to OUT/gpu-SHAPE.json as soon as it is done; a
table and a plot follow. Rows whose package is not installed, and rows for which no time was left, say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import torch
from gpu_cases import SHAPES, Made, Shape, Workbench, free
from measure import saved_bytes

import lit_peft
from lit_peft import (
    AdapterHSettings,
    AdapterPSettings,
    ParallelSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
)

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
WARM_UP = 3


def step_rows(bench: Workbench) -> dict[str, dict[str, Callable[[], Made]]]:
    """Each group's ways to take a step, by the names of their rows; a group's first row is done first."""
    ours, peft, lora = bench.ours, bench.peft, bench.lora
    short = partial(bench.batch, length=bench.shape.short)
    return {
        "steps": {
            "lit_peft": partial(ours, compiled=True),
            "lit_peft, eager": ours,
            "lit_peft, checkpointed": partial(ours, compiled=True, checkpointed=True),
            "lit_peft, fp8": partial(ours, quantization="fp8", compiled=True),
            "peft": peft,
            "peft, autocast": partial(peft, autocast=True),
            "peft, autocast, checkpointed": partial(peft, autocast=True, checkpointed=True),
            "peft + Liger": partial(peft, liger=True),
        },
        "small": {
            "lit_peft, short rows": partial(ours, compiled=True, batch=short),
            "lit_peft, short rows, eager": partial(ours, batch=short),
            "peft, short rows": partial(peft, batch=short),
        },
        "packed": {
            "lit_peft, packed rows": partial(ours, compiled=True, batch=bench.packed),
            "lit_peft, packed rows, eager": partial(ours, batch=bench.packed),
        },
        "nf4": {"lit_peft, nf4": partial(ours, quantization="nf4", compiled=True)},
        "forms": {
            "lit_peft, dropout": partial(ours, lora(lora_dropout=0.05), compiled=True),
            "lit_peft, DoRA": partial(ours, lora(use_dora=True), compiled=True),
            "peft, dropout": partial(peft, lora_dropout=0.05),
            "peft, DoRA": partial(peft, use_dora=True),
        },
        "floors": {"floor": partial(bench.floor, compiled=True), "floor, eager": bench.floor},
        "methods": {
            "Prompt Tuning": partial(ours, PromptTuningSettings(num_virtual_tokens=20), compiled=True),
            "Prefix Tuning": partial(
                ours, PrefixTuningSettings(num_virtual_tokens=30, prefix_projection=False), compiled=True
            ),
            "AdapterH": partial(ours, AdapterHSettings(), compiled=True),
            "AdapterP": partial(ours, AdapterPSettings(), compiled=True),
            "Parallel": partial(ours, ParallelSettings(bottleneck_size=bench.shape.hidden // 16), compiled=True),
        },
    }


# In the order in which they are worth the time.
GROUPS = ("steps", "floors", "small", "packed", "unsloth", "decoding", "fit", "forms", "nf4", "methods")
# Rows whose first losses are the same, up to the rounding of their dtypes: all that compute the batch of "steps".
SAME_LOSS = ("lit_peft", "lit_peft, eager", "lit_peft, checkpointed", "peft", "peft, autocast", "peft + Liger")


def take_steps(made: Made, device: torch.device, rounds: int) -> Row:
    """The time of a training step, the memory of its activations and the first losses."""
    model, step = made
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True) if trained else None

    def one() -> torch.Tensor:
        loss = step()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    start = time.perf_counter()
    losses = [float(one())]
    row: Row = {"first_s": time.perf_counter() - start}
    losses += [float(one()) for _ in range(WARM_UP - 1)]
    row.update(loss=losses[0], third_loss=losses[-1])
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    clocks, hosts = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        one()
        hosts.append(time.perf_counter() - start)
        _wait(device)
        clocks.append(time.perf_counter() - start)
    row.update(ms=1e3 * statistics.median(clocks), host_ms=1e3 * statistics.median(hosts))
    if device.type == "cuda":
        row["activations_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        row["launches"] = _launches(one)
    else:
        row["activations_gb"] = saved_bytes(step, model) / 1e9
    return row


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _launches(one: Callable[[], object]) -> int:
    """The kernels and copies of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        one()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages())


def decode(bench: Workbench, rounds: int, tokens: int = 48) -> Iterator[tuple[str, Row]]:
    """Tokens a second of greedy decoding, 8 rows: the base, LoRA on it, and LoRA merged while it generates."""
    model = bench.base().eval()
    prompt = bench.batch(8, min(128, bench.shape.length))["input_ids"]
    given = {"do_sample": False, "pad_token_id": 0, "use_cache": True, "attention_mask": torch.ones_like(prompt)}

    def speed(each: Any) -> Row:
        seconds = []
        with torch.no_grad():
            for number in range(rounds + 1):
                count = tokens if number else 4
                start = time.perf_counter()
                out = each.generate(prompt, min_new_tokens=count, max_new_tokens=count, **given)
                _wait(bench.device)
                seconds.append(time.perf_counter() - start)
        made = (out.shape[1] - prompt.shape[1]) * len(prompt)
        return {"tokens_s": made / statistics.median(seconds[1:]), "sum": int(out.sum())}

    yield "decoding, base", speed(model)
    lit_peft.attach(model, bench.lora())
    yield "decoding, LoRA", speed(model)
    with lit_peft.merged_adapter(model):
        yield "decoding, LoRA merged meanwhile", speed(model)
    lit_peft.detach(model)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    settings = bench.lora()
    config = LoraConfig(r=settings.r, target_modules=settings.target_modules)
    yield "decoding, peft's LoRA", speed(get_peft_model(model, config, autocast_adapter_dtype=False).eval())


def fit(bench: Workbench, steps: int) -> Iterator[tuple[str, Row]]:
    """A step of `Trainer.fit` with the loaders of the data modules, and that of a bare loop over the same batches."""
    import lightning.pytorch as pl

    from lit_peft.data.collate import PadCollator
    from lit_peft.data.loaders import training_loader

    shape = bench.shape
    ids = torch.randint(1, shape.vocabulary, (shape.rows * steps, shape.length)).tolist()
    examples = [{"input_ids": row, "labels": row} for row in ids]
    collate = PadCollator(0)
    loader = training_loader(examples, collate, shape.rows, 0, None, None)
    settings = bench.lora()
    is_gpu = bench.device.type == "cuda"
    module = lit_peft.LoRA(
        base=str(bench.saved()),
        r=settings.r,
        target_modules="all-linear",
        dtype=str(shape.dtype).removeprefix("torch."),
        adapter_dtype="float32",
        compile="auto",
    )
    ends: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            _wait(bench.device)
            ends.append(time.perf_counter())

    start = time.perf_counter()
    pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if is_gpu else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[Clock()],
    ).fit(module, loader)
    own = [after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]
    yield "fit", {"ms": 1e3 * statistics.median(own), "first_s": ends[0] - start}
    del module
    free(bench.device)
    model = bench.attached()
    if is_gpu:
        lit_peft.compile_layers(model, backend=bench.backend)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    seconds = []
    for number in range(steps):
        rows = examples[number * shape.rows : (number + 1) * shape.rows]
        batch = {name: value.to(bench.device) for name, value in collate(rows).items() if name != "attention_mask"}
        start = time.perf_counter()
        with lit_peft.supervised_loss(model):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(bench.device)
        seconds.append(time.perf_counter() - start)
    yield "bare loop", {"ms": 1e3 * statistics.median(seconds[WARM_UP + 1 :])}


def unsloth(bench: Workbench, rounds: int, name: str) -> Iterator[tuple[str, Row]]:
    """Unsloth's step, in a process of its own: it replaces parts of transformers when it is imported."""
    if importlib.util.find_spec("unsloth") is None:
        raise ModuleNotFoundError(name="unsloth")
    for checkpointed in (False, True):
        command = [sys.executable, str(Path(__file__).with_name("gpu_unsloth.py")), str(bench.saved()), name]
        command += [str(rounds), str(int(checkpointed))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        yield "Unsloth, checkpointed" if checkpointed else "Unsloth", json.loads(done.stdout.splitlines()[-1])


def rows_of(group: str, bench: Workbench, rounds: int, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The rows of a group: names, and what measures them."""
    if group == "decoding":
        yield group, lambda: decode(bench, max(rounds // 3, 1))
    elif group == "fit":
        yield group, lambda: fit(bench, WARM_UP + 3 + rounds)
    elif group == "unsloth":
        yield group, lambda: unsloth(bench, rounds, name)
    else:
        for row, make in step_rows(bench)[group].items():
            yield row, lambda make=make: take_steps(make(), bench.device, rounds)


@contextmanager
def fresh_compiler(device: torch.device) -> Iterator[None]:
    """Forget compiled code and cached memory afterwards, so that no row profits from those before it."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        free(device)


def measured(group: str, name: str, run: Callable[[], Any], device: torch.device) -> dict[str, Row]:
    """What a row measured; or why it did not."""
    found: dict[str, Row] = {}
    try:
        with fresh_compiler(device):
            result = run()
            if isinstance(result, dict):
                found[name] = result
            else:
                found.update(result)
    except ImportError as problem:
        found[name] = {"skipped": f"{problem.name or problem} is not installed"}
    except Exception as problem:  # the other rows are worth having
        found[name] = {"skipped": f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"}
    return {row: {"group": group, **values} for row, values in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=str(GROUPS))
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each row")
    parser.add_argument("--minutes", type=float, default=5.0, help="no row starts later than this")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"gpu-{options.shape}.json"
    shape: Shape = SHAPES[options.shape]
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "shape": options.shape,
        "tokens": shape.rows * shape.length,
        "rounds": options.rounds,
    }
    rows: dict[str, Row] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(shape, device, Path(folder) / "base", options.backend)
        for group in options.groups:
            for name, run in rows_of(group, bench, options.rounds, options.shape):
                if time.monotonic() - began > 60 * options.minutes:
                    rows[name] = {"group": group, "skipped": f"the {options.minutes:g} minutes were over"}
                else:
                    rows.update(measured(group, name, run, device))
                    print(gpu_report.line(name, rows.get(name, {})), f"[{time.monotonic() - began:.0f} s]", flush=True)
                file.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    text = gpu_report.page({**facts, "rows": rows}, SAME_LOSS)
    file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    try:
        gpu_report.plot({**facts, "rows": rows}, file.with_suffix(".svg"))
    except ImportError as problem:
        print(f"There is no plot: {problem.name} is not installed.")


if __name__ == "__main__":
    main()
