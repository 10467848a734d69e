"""Rows per second and memory of the streaming reader, beside those of `datasets` on the same files.

    python benchmarks/reader.py [--rows 300000]

It writes three files of short and long rows (jsonl, one of them compressed with gzip) and reads them in processes of
their own: shuffled rows alone, and batches of tokens. `datasets` reads with `load_dataset(..., streaming=True)`,
`interleave_datasets` and `shuffle`. Time is the wall's; memory is the growth over that of the first tenth of the rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = "a bad film good great is it of poor the this was well weak wonderful awful story acting".split()  # noqa: SIM905
BUFFER = 10_000
WEIGHTS = (0.5, 0.3, 0.2)


def write_files(folder: Path, rows: int) -> list[Path]:
    """Write rows of 5 to 15 words, and every tenth of 200 to 400, in shares of `WEIGHTS`."""
    draw = random.Random(0)

    def texts(share: float) -> Iterator[str]:
        for number in range(int(rows * share)):
            yield " ".join(draw.choices(WORDS, k=draw.randint(200, 400) if number % 10 == 0 else draw.randint(5, 15)))

    paths = [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl")]
    for path, share in zip(paths, WEIGHTS, strict=True):
        with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
            file.writelines(json.dumps({"text": text, "id": at}) + "\n" for at, text in enumerate(texts(share)))
    return paths


def make_tokenizer(folder: Path) -> str:
    """Save a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")
    made.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def our_rows(files: list[str], tokenizer: str) -> Iterator[int]:
    from lit_peft import CausalLMData
    from lit_peft.data.streaming import open_rows

    data = CausalLMData(tokenizer=tokenizer, train=_mixture(files), streaming=True, max_length=512)
    return (1 for block in open_rows(data).blocks(0, 1_000) for _ in block)


def our_batches(files: list[str], tokenizer: str) -> Iterator[int]:
    from lit_peft import CausalLMData

    data = CausalLMData(tokenizer=tokenizer, train=_mixture(files), streaming=True, max_length=512, batch_size=32)
    return (len(batch["input_ids"]) for batch in data.train_dataloader())


def _mixture(files: list[str]) -> Any:
    return dict(zip(files, WEIGHTS, strict=True))


def _their_stream(files: list[str]) -> Any:
    import datasets

    parts = [datasets.load_dataset("json", data_files=file, split="train", streaming=True) for file in files]
    mixed = datasets.interleave_datasets(parts, list(WEIGHTS), seed=0, stopping_strategy="all_exhausted")
    return mixed.shuffle(seed=0, buffer_size=BUFFER)


def their_rows(files: list[str], tokenizer: str) -> Iterator[int]:
    return (1 for _ in _their_stream(files))


def their_batches(files: list[str], tokenizer: str) -> Iterator[int]:
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    made = AutoTokenizer.from_pretrained(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = made(batch["text"], truncation=True, max_length=511, add_special_tokens=False)["input_ids"]
        return {"input_ids": [[*row, made.eos_token_id] for row in ids]}

    rows = _their_stream(files).map(encode, batched=True, remove_columns=["text", "id"])
    loader = DataLoader(rows, batch_size=32, collate_fn=DataCollatorForLanguageModeling(made, mlm=False))
    return (len(batch["input_ids"]) for batch in loader)


WAYS = {
    "lit_peft": {"rows": our_rows, "batches": our_batches},
    "datasets": {"rows": their_rows, "batches": their_batches},
}


def measure(library: str, what: str, tokenizer: str, files: list[str], rows: int) -> None:
    """Read everything, and print the rows per second and the growth of the memory in MB."""
    from lit_peft.util.memory import peak_memory

    next(WAYS[library][what](files, tokenizer))  # imports do not count
    count, early, began = 0, 0, time.perf_counter()
    for size in WAYS[library][what](files, tokenizer):
        count += size
        if not early and count >= rows / 10:
            early = peak_memory() or 0
    seconds = time.perf_counter() - began
    print(json.dumps({"rows": count, "rate": count / seconds, "grown": ((peak_memory() or 0) - early) / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--measure", nargs="+", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        library, what, tokenizer, *files = given.measure
        measure(library, what, tokenizer, files, given.rows)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, tokenizer = write_files(folder, given.rows), make_tokenizer(folder)
        print(f"{given.rows:,} rows in {', '.join(f'{f.name} {f.stat().st_size / 2**20:.0f} MB' for f in files)}")
        for what in ("rows", "batches"):
            for library in WAYS:
                arguments = ["--rows", str(given.rows), "--measure", library, what, tokenizer, *map(str, files)]
                done = subprocess.run(
                    [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{what:8} {library:9} {found['rate']:9,.0f} rows/s, {found['rows']:,} rows, "
                    f"{found['grown']:.0f} MB more"
                )


if __name__ == "__main__":
    main()
