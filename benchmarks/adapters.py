"""What adapters cost after training: merged decoding, switching, merging, files.

    python benchmarks/adapters.py --out benchmarks/results     # JSON and a Markdown table

Decoding is timed in pairs, base and merged in turn, and judged by the median of the pairs' ratios. Memory is what a
merge adds to a process that has merged a model of next to no size before.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import lit_peft

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TARGETS = ["q_proj", "v_proj"]
# Merges one after the other, the first for the imports; prints by how much each raised this process's memory at most,
# all of it, and without the mapped files' clean pages.
WATCHED = """
import gc, json, sys, threading, time
from lit_peft.cli import main
from lit_peft.util.memory import process_memory
def memory():
    return {name: process_memory(name) for name in ("VmRSS", "RssAnon")}
peak = {}
def watch():
    while True:
        for name, value in memory().items():
            peak[name] = max(peak.get(name, 0), value)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
for number, arguments in enumerate(json.loads(sys.argv[1])):
    gc.collect()
    before = memory()
    peak.clear()
    assert main(arguments) == 0
    print("peak", peak["VmRSS"] - before["VmRSS"], peak["RssAnon"] - before["RssAnon"])
"""


def base(folder: Path, shape: dict[str, int], vocabulary: int) -> Path:
    """Write a random Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=vocabulary, **shape, eos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The model in a folder, ready to answer."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(folder: Path) -> Any:
    """The base with a LoRA that changes what it says."""
    model = lit_peft.attach(load(folder), lit_peft.LoRASettings(r=16, target_modules=TARGETS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return model


@torch.inference_mode()
def decoding(folder: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of the base, the merged model and the model with its LoRA beside it; ratios to the base."""
    models = {"base": load(folder), "merged": lit_peft.merge(adapted(folder)), "unmerged": adapted(folder)}
    ids = torch.randint(0, 1000, (1, 16))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(taken),
            "of_base": statistics.median(b / t for b, t in zip(seconds["base"], taken, strict=True)),
        }
        for name, taken in seconds.items()
    }


def switching(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds to load the base and to switch among eight adapters; the medians of pairs."""
    model = load(folder)
    for number in range(8):
        settings = lit_peft.LoRASettings(r=2 ** (1 + number % 4), target_modules=TARGETS)
        lit_peft.add_adapter(model, f"a{number}", settings)
    loading, switches = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        load(folder)
        loading.append(time.perf_counter() - start)
        start = time.perf_counter()
        for step in range(80):
            lit_peft.set_adapter(model, f"a{step % 8}")
        switches.append((time.perf_counter() - start) / 80)
    return {
        "loading_s": statistics.median(loading),
        "switch_s": statistics.median(switches),
        "of_loading": statistics.median(s / a for s, a in zip(switches, loading, strict=True)),
    }


def merging(folder: Path, tiny: Path, scratch: Path, shard: str) -> dict[str, Any]:
    """The peak memory of `lit-peft merge` by the bytes of the merged model."""
    runs = []
    for model, dtype in ((tiny, "float32"), (folder, "float32"), (folder, "bfloat16")):
        adapter, out = scratch / f"{model.name}-adapter", scratch / f"{model.name}-{dtype}"
        if not adapter.exists():
            lit_peft.save_adapter(adapted(model), adapter)
        given = ["merge", "--base", str(model), "--adapter", str(adapter), "--output", str(out)]
        runs.append([*given, "--dtype", dtype, "--max_shard_size", shard])
    command = [sys.executable, "-c", WATCHED, json.dumps(runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peaks = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("peak ")]
    result: dict[str, Any] = {}
    for dtype, (resident, own) in zip(("float32", "bfloat16"), peaks[1:], strict=True):
        size = sum(file.stat().st_size for file in (scratch / f"{folder.name}-{dtype}").glob("*.safetensors"))
        result[dtype] = {"mb": size / 1e6, "copies_resident": int(resident) / size, "copies_own": int(own) / size}
    return result


def file_size(folder: Path, scratch: Path) -> dict[str, float]:
    """The adapter's file by the bytes of its parameters."""
    model = adapted(folder)
    count = lit_peft.trainable_parameters(model)
    file = lit_peft.save_adapter(model, scratch / "adapter") / "adapter_model.safetensors"
    return {"parameters": count, "of_parameters": file.stat().st_size / (4 * count)}


PARTS = ("decoding", "switching", "merging", "file")


def measured(part: str, folder: Path, tiny: Path, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One part's figures."""
    if part == "decoding":
        return decoding(folder, options.rounds, options.tokens)
    if part == "switching":
        return switching(folder, options.rounds)
    if part == "merging":
        return merging(folder, tiny, scratch, "100MB")
    return file_size(folder, scratch)


def table(result: dict[str, Any]) -> str:
    """The measured figures with their goals."""
    rows = [
        ("merged decoding, of the base's tokens/s", ("decoding", "merged", "of_base"), ">= 0.97"),
        ("decoding with the LoRA beside the base", ("decoding", "unmerged", "of_base"), ""),
        ("a switch among 8 adapters, of loading the base", ("switching", "of_loading"), "< 0.01"),
        ("merging in float32, own memory in copies of the model", ("merging", "float32", "copies_own"), "about 1"),
        ("the same, mapped files' pages counted", ("merging", "float32", "copies_resident"), ""),
        ("merging to bfloat16, own memory in copies of the result", ("merging", "bfloat16", "copies_own"), "about 1"),
        ("an adapter's file, of its parameters' bytes", ("file", "of_parameters"), "<= 1.01"),
    ]
    lines = ["| | measured | goal |", "|---|---|---|"]
    for text, keys, goal in rows:
        value: Any = result
        for key in keys:
            value = value.get(key, {})
        if value:
            lines.append(f"| {text} | {value:.4g} | {goal} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; the rest stays")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="of the base, 1024 wide")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "adapters.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        scratch, shape = Path(name), {**SHAPE, "num_hidden_layers": options.layers}
        folder, tiny = base(scratch / "base", shape, 32_000), base(scratch / "tiny", TINY, 64)
        for part in options.parts:
            result[part] = {**measured(part, folder, tiny, scratch, options), "layers": options.layers}
    result["machine"] = {"machine": platform.machine(), "torch": torch.__version__}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "adapters.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
