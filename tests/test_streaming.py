"""Training rows that are read during training: each once, in an order that depends on the seed only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume_data import Seen, same

import lit_peft
from lit_peft import CausalLMData, LitPeftError, TextClassificationData
from lit_peft.data import streaming

WORDS = "a bad film good great is it of poor the this was well weak wonderful awful".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [f"{a} {b} film {c}" for a in WORDS[:5] for b in WORDS[5:10] for c in WORDS[10:15]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCHES_PER_BLOCK", 3)


def data(decoder: Path, file: Path, **settings: Any) -> CausalLMData:
    return CausalLMData(
        base=str(decoder), train=str(file), max_length=8, **{"batch_size": 4, "streaming": True, **settings}
    )


def rows(loader: Any) -> list[list[int]]:
    return [row.tolist() for batch in loader for row in batch["input_ids"]]


def run(decoder: Path, file: Path, folder: Path, steps: int, resume: Any = None, **settings: Any) -> Any:
    pl.seed_everything(0)
    module = lit_peft.LoRA(base=str(decoder), learning_rate=1e-2, lr_scheduler="constant", warmup_steps=0)
    seen = Seen()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[seen, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(decoder, file, **settings), ckpt_path=resume)
    return seen, {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_each_row_once_in_an_order_of_the_seed(decoder: Path, file: Path) -> None:
    whole = rows(data(decoder, file, streaming=False, validation_fraction=0).train_dataloader())
    loader = data(decoder, file).train_dataloader()
    loader.epoch = lambda: epoch
    epoch = 0
    first = rows(loader)
    assert sorted(first) == sorted(whole) and len({*map(tuple, first)}) == 125
    assert rows(loader) == first
    epoch = 1
    assert rows(loader) != first and sorted(rows(loader)) == sorted(first)
    assert rows(data(decoder, file, seed=1).train_dataloader()) != first
    assert rows(data(decoder, file, num_workers=2).train_dataloader()) == first
    ordered = data(decoder, file, shuffle_buffer=1)
    ends = ordered.tokenizer([json.loads(line)["text"] for line in file.read_text().splitlines()])["input_ids"]
    assert [row[:4] for row in rows(ordered.train_dataloader())] == ends


def test_processes_share_the_rows(decoder: Path, file: Path) -> None:
    made = data(decoder, file)
    shares = []
    for rank in range(2):
        loader = made.train_dataloader()
        loader.dataset.num_replicas, loader.dataset.rank, loader.dataset.batch_size = 2, rank, 2
        shares.append(rows(loader))
    assert len(shares[0]) == len(shares[1]) == 63  # one of 125 is repeated
    assert {*map(tuple, shares[0] + shares[1])} == {*map(tuple, rows(made.train_dataloader()))}


def test_training_resumes_in_the_middle_of_the_stream(decoder: Path, file: Path, tmp_path: Path) -> None:
    # 125 rows in blocks of 12 are 32 batches: the run ends in the second epoch.
    whole = run(decoder, file, tmp_path / "whole", 44)
    first = [ids for batch in whole[0].batches[:32] for ids in batch]
    assert len(first) == len({*first}) == 125
    same(run(decoder, file, tmp_path / "workers", 44, num_workers=2), whole)
    for step in (5, 12, 32, 37):
        stored = tmp_path / "whole" / f"step={step}.ckpt"
        same(run(decoder, file, tmp_path / str(step), 44, stored), whole, since=step)
    with pytest.raises(LitPeftError, match=r"data.shuffle_buffer 10000, and now it is 7"):
        run(decoder, file, tmp_path / "b", 44, tmp_path / "whole" / "step=5.ckpt", shuffle_buffer=7)


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt"])
def test_other_files_and_datasets_stream(kind: str, decoder: Path, file: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    table, other = Dataset.from_dict({"more": [[1]] * 125, "text": texts}), tmp_path / f"a.{kind}"
    if kind == "csv":
        table.remove_columns("more").to_csv(other)
    elif kind == "parquet":
        table.to_parquet(other)
    else:
        other.write_text("\n".join(texts))
    wanted = sorted(rows(data(decoder, file).train_dataloader()))
    assert sorted(rows(data(decoder, other).train_dataloader())) == wanted
    hub = CausalLMData(
        base=str(decoder), dataset=str(tmp_path), streaming=True, max_length=8, validation="train", limit_validation=9
    )
    assert sorted(rows(hub.train_dataloader())) == wanted
    assert len(rows(hub.val_dataloader())) == 9


def test_settings_that_exclude_streaming_are_reported(decoder: Path, file: Path, encoder: Path, tmp_path: Path) -> None:
    for name, value in {
        "group_by_length": True,
        "limit_train": 5,
        "test_fraction": 0.1,
        "where": {"a": 1},
        "num_proc": 2,
    }.items():
        with pytest.raises(LitPeftError, match=name):
            data(decoder, file, **{name: value})
    with pytest.raises(LitPeftError, match=r"set trainer.max_steps"):
        pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
            lit_peft.LoRA(base=str(decoder)), data(decoder, file)
        )
    with pytest.raises(LitPeftError, match=r"no column 'txt'.*'text'"):
        data(decoder, file, text_column="txt").setup("fit")
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"text": "good film", "label": "pos"}\n{"text": "bad film", "label": "neg"}\n')
    settings: dict[str, Any] = {"base": str(encoder), "train": str(labelled), "streaming": True}
    with pytest.raises(LitPeftError, match=r"data.labels"):
        TextClassificationData(**settings).setup("fit")
    batch = next(iter(TextClassificationData(**settings, labels=["neg", "pos"]).train_dataloader()))
    assert torch.equal(batch["labels"].sort().values, torch.tensor([0, 1]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "good"}\n' * 40 + '{"text": \n', "line 41 is not valid JSON"),
        ("a.json", '[null, {"text": "x"}]', "row 1 is not a JSON object"),
        ("a.json", '[Infinity, {"text": {}}, {"text": "x"}]', "row 1 is not a JSON object"),
        ("a.json", '[{"text": "good"},\n{"text": "film"} 1]', "broken JSON at line 2, column 18"),
        ("a.json", '[{"text": "good"}] [', "there is text after the end of the list"),
        ("a.jsonl", '{"text": "good"}\n' * 40 + '["b"]', "line 41 is not a JSON object"),
        ("a.jsonl", '{"text": "good"}\n{"text": "\\ud800"}', "line 2 has half of a surrogate pair"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9 in line 2"),
        ("a.jsonl", '{"text": "good"}\n{"text": ["x"]}', "row 2: column 'text' has .'x'., which is not text"),
        ("a.jsonl", '{"text": "good"}\n' * 50 + '{"text": " "}', "row 51 has no text"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "{}", "no column 'text'"),
        ("a.jsonl", '{"txt": "good"}', "no column 'text'"),
        ("a.csv", "text\n", "has no rows"),
        ("a.csv", "text,b\n" + "good,1\n" * 50 + " ,1\n", "row 51 has no text"),
        ("a.csv", 'text,b\ngood,1\n"bad', "a quote opened in row 2 is never closed"),
        ("a.csv", "text,b\ngood,1\ngood,1,2\n", "line 3 has 3 cells"),
        ("a.csv", b"text,b\ngood,1\ncaf\xe9,1", "is not UTF-8: byte 0xe9 in line 3"),
        ("a.txt", b"good\nfilm\xe9", "is not UTF-8: byte 0xe9 in line 2"),
        ("a.parquet", b"PAR1", "is not a readable parquet file"),
    ],
)
def test_what_is_wrong_with_a_row_is_reported(
    name: str, content: str | bytes, said: str, workers: int, decoder: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LitPeftError, match=said) as problem:
        made = data(decoder, file, num_workers=workers)
        made.setup("fit")
        rows(made.train_dataloader())
    assert len(str(problem.value).splitlines()) == 1 and "data.train" in str(problem.value)


def test_a_block_of_prompts_that_are_too_long_is_skipped(decoder: Path, tmp_path: Path) -> None:
    short, long = {"prompt": "a film", "completion": "good"}, {"prompt": "bad " * 9, "completion": "good"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*[short] * 12, *[long] * 24, *[short] * 12]))
    settings = {"shuffle_buffer": 1, "completion_column": "completion"}
    made = data(decoder, path, **settings)
    made.setup("fit")
    assert len(rows(made.train_dataloader())) == 24
    assert made.report() == [
        f"data.train: {line} (in one block of the stream)"
        for line in (
            "12 of 12 rows (100.0 %) dropped, because data.max_length 8 leaves nothing of their answers.",
            "24 of 24 tokens to learn (100.0 %) lost, because data.max_length is 8: set data.max_length to 11 to lose "
            "none.",
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [long] * 12))
    with pytest.raises(LitPeftError, match=r"none of the first rows .* data\.max_length 8"):
        data(decoder, path, **settings).setup("fit")


def test_a_list_and_columns_of_several_types_stream(decoder: Path, file: Path, tmp_path: Path) -> None:
    """A list is read bit by bit: objects break off where a bit ends."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kinds: list[Any] = [1, "2020-01-01", {"z": [1]}, None, True]
    wanted = [{**row, "more": kinds[at % 5]} for at, row in enumerate(lines)]
    other = tmp_path / "a.json"
    other.write_text(json.dumps(wanted, indent=1))
    assert sorted(rows(data(decoder, other).train_dataloader())) == sorted(rows(data(decoder, file).train_dataloader()))


_MEASURE = """
import sys
from lit_peft import CausalLMData
from lit_peft.util.memory import peak_memory
def count(file):
    data = CausalLMData(base=sys.argv[1], train=file, streaming=True, shuffle_buffer=1000, max_length=16)
    return sum(len(batch["input_ids"]) for batch in data.train_dataloader())
count(sys.argv[2])
small = peak_memory()
print(*map(count, sys.argv[3:]), (peak_memory() - small) // 2**20)
"""


@pytest.mark.heavy
def test_memory_is_bounded(decoder: Path, tmp_path: Path) -> None:
    """For a file with one object per line, and for a list; both files are larger than the memory that is allowed."""
    files = [tmp_path / "small.jsonl", tmp_path / "large.jsonl", tmp_path / "large.json"]
    for path, count in zip(files, (2_000, 9_000, 9_000), strict=True):
        made = (json.dumps({"text": f"a good film {at}", "other": "x" * 8_000}) for at in range(count))
        path.write_text("\n".join(made) if path.suffix == ".jsonl" else "[" + ",\n".join(made) + "]")
    command = [sys.executable, "-c", _MEASURE, str(decoder), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *counts, grown = map(int, done.stdout.split()[-3:])
    assert counts == [9_000, 9_000]
    assert grown < 30, f"{grown} MB more"
