"""Try every method on every model type of transformers that can be built small, and write the table of docs/support.md.

    python tools/sweep.py --results support.jsonl            # goes on where it was stopped; about half an hour
    python tools/sweep.py --results support.jsonl --write    # write the table to docs/support.md

A pair of model and method passes if the loss falls within a few steps, every trained parameter gets a gradient, the
answers are the same with padding on the left and with a cache (where the base's own are), and a saved adapter, loaded
into a fresh base, answers the same to 1e-5. Otherwise it must be refused when the method is attached.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from sweep_models import LISTS, VOCABULARY, build, left_out, model_types
from torch import Tensor

import lit_peft

DOCS = Path(__file__).parents[1] / "docs" / "support.md"
START, END = "<!-- sweep: start -->\n", "<!-- sweep: end -->\n"
METHODS: dict[str, Any] = {
    "LoRA": lit_peft.LoRASettings(),
    # Wider than by default: with two units, both may be off for all tokens.
    "AdapterH": lit_peft.AdapterHSettings(reduction_factor=2),
    "AdapterP": lit_peft.AdapterPSettings(reduction_factor=2),
    "Parallel": lit_peft.ParallelSettings(),
    "PromptTuning": lit_peft.PromptTuningSettings(num_virtual_tokens=4),
    "PTuning": lit_peft.PTuningSettings(num_virtual_tokens=4),
    "PrefixTuning": lit_peft.PrefixTuningSettings(num_virtual_tokens=4),
    "PTuningV2": lit_peft.PTuningV2Settings(num_virtual_tokens=4),
}
PADDING = 8
GENERATION: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def batch(kind: str) -> dict[str, Tensor]:
    """Two rows of nine tokens, and their labels."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    labels = {"decoder": ids, "encoder": torch.tensor([0, 1]), "encoder-decoder": ids[:, :5].contiguous()}[kind]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def padded(ids: Tensor, count: int) -> dict[str, Tensor]:
    """The rows with padding on their left."""
    zeros = torch.zeros(len(ids), count, dtype=torch.long)
    return {"input_ids": torch.cat([zeros, ids], 1), "attention_mask": torch.cat([zeros, torch.ones_like(ids)], 1)}


@torch.no_grad()
def answers(model: Any, kind: str) -> dict[str, Tensor]:
    """What a model says, plainly, with padding, and in generation with and without a cache."""
    inputs = batch(kind)
    ids = inputs["input_ids"]
    if kind == "encoder":
        return {"logits": model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits}
    if kind == "encoder-decoder":
        given = {"decoder_input_ids": inputs["labels"]}
        return {
            "logits": model(**padded(ids, 0), **given).logits,
            "padded": model(**padded(ids, PADDING), **given).logits,
        }
    found = {
        "logits": model(**padded(ids, 0)).logits,
        "padded": model(**padded(ids, PADDING)).logits[:, PADDING:],
    }
    for name, count, cache in (("cached", 0, True), ("uncached", 0, False), ("written", PADDING, True)):
        found[name] = model.generate(**padded(ids, count), **GENERATION, use_cache=cache)[:, count:]
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def sound(found: dict[str, Tensor], tolerance: float) -> set[str]:
    """Which of the ways of asking give the same answer as the plain one, up to a share of its largest value."""
    alike = {"logits"}
    if "padded" in found and distance(found["padded"], found["logits"]) <= tolerance:
        alike.add("padded")
    for name in ("uncached", "written"):
        if name in found and torch.equal(found[name], found["cached"]):
            alike.add(name)
    return alike


def resting_parameters(base: Any, kind: str) -> set[str]:
    """The names of a base's parameters that get no gradient when everything is trained."""
    base(**batch(kind)).loss.backward()
    resting = {name for name, p in base.named_parameters() if p.grad is None or not p.grad.any()}
    base.zero_grad()
    return resting


def check(base: Any, kind: str, method: str, expected: set[str], resting: set[str]) -> str:
    """Try one method on one model; return "yes", "no: REASON" if it was refused, or "FAIL: WHAT".

    `resting` has the base's `resting_parameters`: this head does not use them, so an adapter beside them gets no
    gradient either.
    """
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    try:
        lit_peft.attach(model, METHODS[method])
    except lit_peft.LitPeftError as refusal:
        return f"no: {refusal}"
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    moved: set[str] = set()
    losses = []
    model.train()
    for _ in range(6):
        torch.manual_seed(1)
        loss = model(**batch(kind)).loss
        optimizer.zero_grad()
        loss.backward()
        moved |= {name for name, p in trained.items() if p.grad is not None and bool(p.grad.abs().max() > 0)}
        optimizer.step()
        losses.append(loss.item())
    if not min(losses[1:]) < losses[0]:
        return f"FAIL: the loss does not fall: {losses}"
    unused = {name.rpartition(".")[0] for name in resting}
    still = sorted(name for name in set(trained) - moved if not any(in_layer(name, path) for path in unused))
    if still:
        return f"FAIL: {len(still)} of {len(trained)} parameters get no gradient, e.g. {still[0]}"
    found = answers(model.eval(), kind)
    missing = expected - sound(found, 1e-4)
    if missing:
        return f"FAIL: other answers when {', '.join(sorted(missing))}"
    with tempfile.TemporaryDirectory() as folder:
        lit_peft.save_adapter(model, Path(folder) / "adapter")
        loaded = lit_peft.load_adapter(copy.deepcopy(base), Path(folder) / "adapter").eval()
    again = answers(loaded, kind)["logits"]
    moved_by = distance(again, found["logits"])
    return "yes" if moved_by <= 1e-5 else f"FAIL: a loaded adapter answers otherwise, by {moved_by:.1e}"


def in_layer(name: str, path: str) -> bool:
    """Whether a trained parameter belongs to an adapter of the module at a path, or of the block around it."""
    layer = re.match(r".*?\.\d+\.", f"{path}.")
    return name.startswith(f"{path}.") or (layer is not None and "adapter" in name and name.startswith(layer[0]))


def sweep(results: Path, only: list[str], methods: list[str]) -> None:
    """Try what is not in the file of results yet: these model types (all if there are none) with these methods."""
    known = {(row["kind"], row["model"], row["method"]) for row in read(results)}
    for kind in LISTS:
        for name in model_types(kind):
            todo = [method for method in methods if (kind, name, method) not in known]
            if (only and name not in only) or not todo:
                continue
            try:
                base = build(name, kind)
                resting = resting_parameters(base, kind)
                expected = sound(answers(base, kind), 2e-5)
            except Exception:  # a model that cannot be built small, or does not run on a CPU, is no row
                continue
            for method in todo:
                try:
                    found = check(base, kind, method, expected, resting)
                except Exception as problem:
                    first_line = (str(problem).strip().splitlines() or [""])[0][:200]
                    found = f"FAIL: {type(problem).__name__}: {first_line}"
                row = {"kind": kind, "model": name, "method": method, "result": found}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                if not found.startswith("yes"):
                    print(f"{kind} {name} {method}: {found}", flush=True)


def read(results: Path) -> list[dict[str, str]]:
    """The rows of a file of results."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def general(reason: str) -> str:
    """A refusal without the names of one model, so that those of many models are one note."""
    reason = re.sub(r"^[\w.]+ \(\w+\) ", "An attention layer ", reason)
    reason = re.sub(r"^\w+ (?=has )", "The model ", reason) if not reason.startswith("An ") else reason
    return re.sub(r"target_modules=\['[^]]*\]", "target_modules=[...]", reason)


def write(rows: list[dict[str, str]]) -> None:
    """Write the counts, the table and its notes to docs/support.md."""
    notes: dict[str, int] = {}
    tried = {kind: {row["model"] for row in rows if row["kind"] == kind} for kind in LISTS}
    counts = [f"{len(names)} {kind}s" for kind, names in tried.items()]
    passed = sum(row["result"] == "yes" for row in rows)
    refused = sum(row["result"].startswith("no: ") for row in rows)
    failed = len(rows) - passed - refused
    lines = [
        f"With transformers {'.'.join(transformers.__version__.split('.')[:2])} these are {', '.join(counts[:-1])} and "
        f"{counts[-1]}: {passed:,} of {len(rows):,} pairs run, {refused} are refused, {failed or 'none'} "
        f"{'fail' if failed > 1 else 'fails'}.",
        "",
        "| model type | " + " | ".join(f"`{method}`" for method in METHODS) + " |",
        "|---|" + "---|" * len(METHODS),
    ]
    results = {(row["kind"], row["model"], row["method"]): row["result"] for row in rows}
    for kind in LISTS:
        for name in sorted(tried[kind]):
            cells = []
            for method in METHODS:
                found = results.get((kind, name, method), "not tried")
                reason = general(found.removeprefix("no: "))
                cells.append("yes" if found == "yes" else f"no [{notes.setdefault(reason, len(notes) + 1)}]")
            lines.append(f"| {name} ({kind}) | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {note}" for note, number in notes.items())]
    reasons: dict[str, list[str]] = {}
    for name in sorted({name for _, names in LISTS.values() for name in names}):
        if (why := left_out(name)) is not None:
            reasons.setdefault(why, []).append(f"`{name}`")
    lines += ["", "Without a row:", "", *(f"- {', '.join(names)}: {reason}." for reason, names in reasons.items())]
    before, _, after = DOCS.read_text(encoding="utf-8").partition(START)
    DOCS.write_text(before + START + "\n".join(lines) + "\n" + END + after.partition(END)[2], encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file of results, one JSON object a line")
    parser.add_argument("--only", nargs="*", default=[], metavar="MODEL_TYPE", help="these model types alone")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="these methods alone")
    parser.add_argument("--write", action="store_true", help="write docs/support.md from the file, and try nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if given.write:
        write(read(given.results))
    else:
        sweep(given.results, given.only, given.methods)


if __name__ == "__main__":
    main()
