"""What the settings of the data may name: several files, globs, folders, URLs, datasets, mixtures and named sets."""

from __future__ import annotations

import bz2
import collections
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume_data import Seen, same

import lit_peft
from lit_peft import CausalLMData, LitPeftError, TextClassificationData
from lit_peft.data import remote, streaming
from lit_peft.data.sampling import Mixture

WORDS = "a bad film good great is it of poor the this was well weak wonderful awful".split()  # noqa: SIM905


def texts(start: int, count: int) -> list[str]:
    found = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    return found[start : start + count]


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [row if isinstance(row, dict) else {"text": row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def data(decoder: Path, train: Any, **settings: Any) -> CausalLMData:
    usual = {"max_length": 8, "batch_size": 4, "validation_fraction": 0.0}
    return CausalLMData(base=str(decoder), train=train, **{**usual, **settings})


def seen(made: Any, split: str = "train") -> list[str]:
    """The texts of a split, from its batches."""
    loader = getattr(made, {"train": "train", "validation": "val"}.get(split, split) + "_dataloader")()
    loaders = loader if isinstance(loader, list) else [loader]
    rows = (row for one in loaders for batch in one for row in batch["input_ids"])
    return [made.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


# ------------------------------------------------------------------------------------------- what is named


@pytest.mark.parametrize("stream", [False, True])
def test_several_files_globs_and_folders_are_read(stream: bool, decoder: Path, tmp_path: Path) -> None:
    first, second, third = texts(0, 5), texts(5, 6), texts(11, 7)
    one = write(tmp_path / "in" / "a.jsonl", first)
    write(tmp_path / "in" / "deep" / "b.json", second)
    (tmp_path / "in" / "c.csv").write_text("\n".join(["text", *third]))
    (tmp_path / "in" / "notes.md").write_text("x")
    everything = sorted(first + second + third)
    settings: dict[str, Any] = {"streaming": stream}
    assert sorted(seen(data(decoder, [one, str(tmp_path / "in" / "c.csv")], **settings))) == sorted(first + third)
    found = data(decoder, str(tmp_path / "in"), **settings)
    assert sorted(seen(found)) == everything
    assert any("is 3 files: a.jsonl, c.csv, deep/b.json. Not read: notes.md." in line for line in found.report())
    assert sorted(seen(data(decoder, str(tmp_path / "in" / "**" / "*.js*"), **settings))) == sorted(first + second)


def test_a_folder_of_splits_gives_each_its_files(decoder: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "train-0.jsonl", texts(0, 5))
    write(tmp_path / "d" / "train-1.jsonl", texts(5, 5))
    write(tmp_path / "d" / "dev" / "rows.jsonl", texts(10, 3))
    folder = str(tmp_path / "d")
    made = data(decoder, folder, validation=folder)
    assert sorted(seen(made)) == sorted(texts(0, 10)) and seen(made, "validation") == texts(10, 3)
    with pytest.raises(
        LitPeftError, match=r"a folder with files of train, validation, by their names, and none of test"
    ):
        data(decoder, folder, test=folder).setup("test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LitPeftError, match=r"is a folder without data files"):
        data(decoder, str(tmp_path / "empty")).setup("fit")
    with pytest.raises(LitPeftError, match=r"data.train '.*x\*.jsonl' matches no file"):
        data(decoder, str(tmp_path / "x*.jsonl")).setup("fit")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_unpacked(suffix: str, stream: bool, decoder: Path, tmp_path: Path) -> None:
    content = Path(write(tmp_path / "a.jsonl", texts(0, 9))).read_bytes()
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # Two frames, as `zstd` writes them for appended files.
        half = content.index(b"\n", len(content) // 2) + 1
        packed = b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    else:
        packed = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content)  # type: ignore[attr-defined]
    path = tmp_path / f"b.jsonl{suffix}"
    path.write_bytes(packed)
    assert sorted(seen(data(decoder, str(path), streaming=stream))) == sorted(texts(0, 9))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(LitPeftError, match=rf"data.train '.*b.jsonl{suffix}' is not a readable {suffix} file"):
        data(decoder, str(path), streaming=stream).setup("fit")


def test_a_file_that_grows_without_bounds_is_refused(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.bz2"
    path.write_bytes(bz2.compress(b'{"text": "' + b"a " * 1_500_000 + b'"}'))
    monkeypatch.setattr(remote, "_MOST_BYTES", 2**20)
    with pytest.raises(LitPeftError, match=r"more than 1,100 times its size"):
        data(decoder, str(path)).setup("fit")


def test_a_missing_package_is_named(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(LitPeftError, match=r"pip install zstandard"):
        data(decoder, str(tmp_path / "a.jsonl.zst")).setup("fit")
    with pytest.raises(LitPeftError, match=r"'nope://a/b.jsonl' cannot be opened.*install the package"):
        data(decoder, "nope://a/b.jsonl").setup("fit")


@pytest.mark.parametrize("stream", [False, True])
def test_urls_are_read_through_fsspec(stream: bool, decoder: Path) -> None:
    memory = fsspec.filesystem("memory")
    name = f"/rows{stream}"
    with memory.open(f"{name}/a.jsonl", "wb") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts(0, 5)).encode())
    with memory.open(f"{name}/b.csv.gz", "wb") as file:
        file.write(gzip.compress("\n".join(["text", *texts(5, 5)]).encode()))
    settings: dict[str, Any] = {"streaming": stream}
    assert sorted(seen(data(decoder, f"memory:/{name}/a.jsonl", **settings))) == sorted(texts(0, 5))
    assert sorted(seen(data(decoder, f"memory:/{name}/*", **settings))) == sorted(texts(0, 10))
    assert sorted(seen(data(decoder, f"memory:/{name}", **settings))) == sorted(texts(0, 10))
    # A changed file is fetched again.
    with memory.open(f"{name}/a.jsonl", "wb") as file:
        file.write(json.dumps({"text": "good film"}).encode())
    assert seen(data(decoder, f"memory:/{name}/a.jsonl", **settings)) == ["good film"]
    with pytest.raises(LitPeftError, match=r"'memory://.*/c.jsonl' could not be read: it does not exist"):
        data(decoder, f"memory:/{name}/c.jsonl", **settings).setup("fit")


@pytest.mark.parametrize("stream", [False, True])
def test_datasets_are_sources_too(stream: bool, decoder: Path, tmp_path: Path) -> None:
    """As folders here: one that `load_dataset` understands, and one that `save_to_disk` wrote."""
    write(tmp_path / "repository" / "train.jsonl", texts(0, 5))
    write(tmp_path / "repository" / "test.jsonl", texts(5, 4))
    saved = {"train": Dataset.from_dict({"text": texts(9, 6)}), "validation": Dataset.from_dict({"text": texts(15, 3)})}
    DatasetDict(saved).save_to_disk(tmp_path / "saved")
    saved["train"].save_to_disk(tmp_path / "single")
    hub = f"hub:{tmp_path}/repository"
    settings: dict[str, Any] = {"streaming": stream}
    assert sorted(seen(data(decoder, hub, **settings))) == sorted(texts(0, 5))
    assert sorted(seen(data(decoder, f"{hub}:test", **settings))) == sorted(texts(5, 4))
    assert sorted(seen(data(decoder, f"{hub}:default:test", **settings))) == sorted(texts(5, 4))
    both = data(decoder, [hub, str(tmp_path / "saved")], validation=str(tmp_path / "saved"), **settings)
    assert sorted(seen(both)) == sorted([*texts(0, 5), *texts(9, 6)])
    assert seen(both, "validation") == texts(15, 3)
    assert sorted(seen(data(decoder, str(tmp_path / "single"), **settings))) == sorted(texts(9, 6))
    with pytest.raises(LitPeftError, match=r":tests' is not a split of .*nearest: 'test'"):
        data(decoder, f"{hub}:tests", **settings).setup("fit")


def test_files_of_other_columns_and_types_are_joined(encoder: Path, tmp_path: Path) -> None:
    """Numbers here and texts there, columns that only one file has, and columns with other names."""
    numbers = write(tmp_path / "a.jsonl", [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}])
    named = write(tmp_path / "b.jsonl", [{"review": "great story", "label": "1", "more": {"x": [1]}, "text": 0}])
    (tmp_path / "c.csv").write_text("text,label\nawful film,0\n")
    sources = [numbers, {"path": named, "columns": {"text": "review"}}, str(tmp_path / "c.csv")]
    settings: dict[str, Any] = {"base": str(encoder), "max_length": 8, "validation_fraction": 0.0}
    made = TextClassificationData(train=sources, **settings)
    found = made.examples("train")
    assert made.label_names == ["0", "1"] and list(found["labels"]) == [1, 0, 1, 0]
    streamed = TextClassificationData(train=sources, labels=["0", "1"], streaming=True, **settings)
    rows = next(iter(streamed.train_dataloader()))
    assert sorted(rows["labels"].tolist()) == [0, 0, 1, 1]
    with pytest.raises(LitPeftError, match=r"b.jsonl' has no column 'reviews' \(columns of data.train\).*'review'"):
        TextClassificationData(train={"path": named, "columns": {"text": "reviews"}}, **settings).setup("fit")
    with pytest.raises(LitPeftError, match=r"b.jsonl', row 1 has no column 'reviews', which columns renames"):
        TextClassificationData(
            train={"path": named, "columns": {"text": "reviews"}}, labels=["0", "1"], streaming=True, **settings
        ).setup("fit")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_names_the_file_and_its_row(stream: bool, decoder: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", texts(0, 5))
    bad = write(tmp_path / "b.jsonl", ["good", "", "film"])
    with pytest.raises(LitPeftError, match=r"data.train '\S+b.jsonl', row 2 has no text"):
        made = data(decoder, [good, bad], streaming=stream)
        made.setup("fit")
        seen(made)
    broken = write(tmp_path / "c.jsonl", texts(0, 3))
    Path(broken).write_text(Path(broken).read_text() + "{")
    with pytest.raises(LitPeftError, match=r"c.jsonl': line 4 is not valid JSON"):
        made = data(decoder, [good, broken], streaming=stream)
        made.setup("fit")
        seen(made)


@pytest.mark.parametrize(
    ("split", "value", "said"),
    [
        ("train", [], "data.train is empty"),
        ("train", {"a.jsonl": 0}, "the weight of 'a.jsonl' is 0; give a number above 0"),
        ("train", {"a.jsonl": 1, "b.jsonl": "x"}, "the weight of 'b.jsonl' is 'x'"),
        ("train", [{"path": "a.jsonl", "weight": 1}, "b.jsonl"], "gives 'a.jsonl' a weight and 'b.jsonl' none"),
        ("train", [{"path": "a.jsonl", "share": 1}], "'share', which is not one of path, weight, columns"),
        ("train", [{"weight": 1}], "a source whose path is None"),
        ("train", {"path": "a.jsonl", "columns": ["x"]}, r"columns of 'a.jsonl' is \['x'\]"),
        ("train", {"one": "a.jsonl", "two": "b.jsonl"}, "only data.validation and data.test may have several sets"),
        ("predict", {"one": "a.jsonl"}, "only data.validation and data.test may have several sets"),
        ("validation", {"a.jsonl": 0.5}, "every row of data.validation is evaluated once; leave weights out"),
        ("validation", {"a/b": "a.jsonl"}, "'a/b' cannot be the name of a set"),
        ("validation", {"mean": "a.jsonl"}, "'mean' cannot be the name of a set"),
        ("train", 3, "data.train is 3; give a file"),
    ],
)
def test_other_forms_are_refused(split: str, value: Any, said: str, decoder: Path) -> None:
    with pytest.raises(LitPeftError, match=said) as problem:
        CausalLMData(base=str(decoder), **{split: value})
    assert len(str(problem.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------ mixtures


def test_a_mixture_has_the_shares_of_its_weights() -> None:
    mixture = Mixture((100, 10), (1, 3))
    assert mixture.counts == [28, 82] and len(mixture.choose(0, 0)) == 110
    epochs = [mixture.choose(epoch, 7).tolist() for epoch in range(4)]
    for chosen in epochs:
        times = collections.Counter(chosen)
        # The small source is repeated evenly; of the large one, no example comes twice.
        assert {times[index] for index in range(100, 110)} == {8, 9}
        assert sum(times[index] for index in range(100)) == 28 == sum(times[index] > 0 for index in range(100))
    # Every example of the large source comes before any comes again.
    large = [index for chosen in epochs for index in chosen if index < 100]
    assert len(set(large[:100])) == 100
    assert mixture.choose(1, 7).tolist() == epochs[1] != mixture.choose(1, 8).tolist()
    assert Mixture((3, 1000), (1e-6, 1)).counts == [1, 1002]
    assert sum(Mixture((5, 5, 5), (1, 1, 1)).counts) == 15


def shares(found: list[str], first: set[str]) -> float:
    return sum(text in first for text in found) / len(found)


@pytest.mark.parametrize("form", ["mapping", "list"])
@pytest.mark.parametrize("stream", [False, True])
def test_weights_are_the_probability_of_the_next_row(form: str, stream: bool, decoder: Path, tmp_path: Path) -> None:
    first = set(texts(0, 30))
    a, b = write(tmp_path / "a.jsonl", texts(0, 30)), write(tmp_path / "b.jsonl", texts(30, 370))
    given: Any = {a: 3, b: 1} if form == "mapping" else [{"path": a, "weight": 0.75}, {"path": b, "weight": 0.25}]
    made = data(decoder, given, streaming=stream)
    made.setup("fit")
    found = seen(made)
    assert abs(shares(found, first) - 0.75) < (0.03 if stream else 0.001)
    if stream:
        # The epoch ends when both have been read.
        assert {*found} == {*texts(0, 400)}
        assert any("probabilities: 75 % from" in line and "25 % from" in line for line in made.report())
    else:
        assert len(found) == 400
        assert any("300 of 400 examples of an epoch (75.0 %) from" in line for line in made.report())
        assert any("has 370 (others in each epoch)" in line for line in made.report())
    assert seen(data(decoder, given, streaming=stream)) == found
    if form == "list":
        assert seen(data(decoder, given, streaming=stream, num_workers=2)) == found
    assert seen(data(decoder, given, streaming=stream, seed=1)) != found


def test_packed_and_bucketed_mixtures_keep_the_shares(decoder: Path, tmp_path: Path) -> None:
    first = texts(0, 20)
    a, b = write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", texts(20, 180))
    wanted = data(decoder, {a: 1, b: 1})
    for settings in ({"packing": True, "max_length": 16}, {"group_by_length": True}):
        made = data(decoder, {a: 1, b: 1}, **settings)
        ids = torch.cat([batch["input_ids"].flatten() for batch in made.train_dataloader()]).tolist()
        text = made.tokenizer.decode(ids)
        count = sum(text.count(f"{row} </s>") for row in first)
        assert count == 100 == sum(row in first for row in seen(wanted))


@pytest.mark.parametrize("stream", [False, True])
def test_a_mixture_resumes_where_it_was(
    stream: bool, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BATCHES_PER_BLOCK", 3)
    a, b = write(tmp_path / "a.jsonl", texts(0, 6)), write(tmp_path / "b.jsonl", texts(6, 60))
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress("\n".join(["text", *texts(66, 20)]).encode()))
    given = {a: 0.5, b: 0.3, str(tmp_path / "c.csv.gz"): 0.2}

    def run(folder: str, resume: Any = None, weights: Any = given, **settings: Any) -> Any:
        pl.seed_everything(0)
        module = lit_peft.LoRA(base=str(decoder), learning_rate=1e-2, lr_scheduler="constant", warmup_steps=0)
        record = Seen()
        pl.Trainer(
            max_steps=30,
            accelerator="cpu",
            default_root_dir=tmp_path / folder,
            callbacks=[record, ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=7, save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data(decoder, weights, streaming=stream, **settings), ckpt_path=resume)
        return record, {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    whole = run("whole")
    for step in (7, 28):
        same(run(f"again{step}", tmp_path / "whole" / f"step={step}.ckpt"), whole, since=step)
    with pytest.raises(LitPeftError, match=r"the weights of data.train"):
        run("other", tmp_path / "whole" / "step=7.ckpt", {**given, b: 0.4})


def test_streams_of_several_files_are_packed_and_resume(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BATCHES_PER_BLOCK", 2)
    draw = random.Random(0)
    rows = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(300)]
    files = [write(tmp_path / "a.jsonl", rows[:200]), write(tmp_path / "b.jsonl", rows[200:])]
    settings: dict[str, Any] = {"streaming": True, "packing": True, "max_length": 32}
    made = data(decoder, files, **settings)
    batches = list(made.train_dataloader())
    found = []
    for batch in batches:
        assert "attention_mask" not in batch and (batch["labels"][batch["position_ids"] == 0] == -100).all()
        for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
            starts = [at for at, position in enumerate(positions) if position == 0]
            found += [
                made.tokenizer.decode(ids[s:e], skip_special_tokens=True)
                for s, e in zip(starts, [*starts[1:], len(ids)], strict=True)
            ]
    assert sorted(filter(None, found)) == sorted(rows)
    tokens = sum(len(row.split()) + 1 for row in rows)
    assert tokens / sum(batch["input_ids"].numel() for batch in batches) > 0.95
    loader = data(decoder, files, **settings).train_dataloader()
    stopped = iter(loader)
    for _ in range(3):
        next(stopped)
    state = loader.state_dict()
    assert state["batches"] == 3
    loader = data(decoder, files, **settings).train_dataloader()
    loader.load_state_dict(state)
    for batch, other in zip(batches[3:], loader, strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
    other = data(decoder, files, **{**settings, "max_length": 40}).train_dataloader()
    with pytest.raises(LitPeftError, match="packing into rows of 32, and now it is 40"):
        other.load_state_dict(state)


# ---------------------------------------------------------------------------------------------- named sets


def test_validation_sets_have_their_own_metrics_and_one_is_monitored(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write(tmp_path / "a.jsonl", texts(0, 20))
    sets = {"short": write(tmp_path / "b.jsonl", texts(30, 6)), "long": write(tmp_path / "c.jsonl", texts(50, 9))}
    logged = {}
    for monitored in (None, "long", "mean"):
        made = data(decoder, train, validation=sets, test=sets, validation_monitor=monitored)
        pl.seed_everything(0)
        module = lit_peft.LoRA(base=str(decoder), learning_rate=1e-2)
        trainer = pl.Trainer(
            max_steps=2,
            val_check_interval=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, made)
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        expected = {"val_loss", "val_loss/short", "val_loss/long"}
        assert expected <= set(logged) and not [name for name in logged if "dataloader_idx" in name]
        short, long = logged["val_loss/short"], logged["val_loss/long"]
        assert logged["val_loss"] == pytest.approx({None: short, "long": long, "mean": (short + long) / 2}[monitored])
        assert short != long
        trainer.test(module, made, verbose=False)
        tested = {name: value.item() for name, value in trainer.callback_metrics.items()}
        assert tested["test_loss/short"] == pytest.approx(short) and tested["test_loss/long"] == pytest.approx(long)
        # Each alone gives the same.
        alone = data(decoder, train, validation=sets["long"])
        (only, *_) = trainer.validate(module, alone, verbose=False)
        assert only["val_loss"] == pytest.approx(long)
    with pytest.raises(LitPeftError, match=r"data.validation_monitor is 'longs'.*'long'"):
        data(decoder, train, validation=sets, validation_monitor="longs")


def test_the_limit_applies_to_each_set_and_their_rows_are_not_trained_on(decoder: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", texts(0, 20))
    sets = {"one": write(tmp_path / "b.jsonl", texts(15, 10)), "two": [write(tmp_path / "c.jsonl", texts(0, 3))]}
    made = data(decoder, train, validation=sets, limit_validation=2)
    made.setup("fit")
    assert [len(loader.dataset) for loader in made.val_dataloader()] == [2, 2]
    assert sorted(seen(made)) == sorted(texts(3, 12))


# ------------------------------------------------------------------------------------------------ commands


def test_the_command_line_and_yaml_take_every_form(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from lit_peft.cli import main

    a, b = write(tmp_path / "a.jsonl", texts(0, 12)), write(tmp_path / "b.jsonl", texts(12, 12))
    one, two = write(tmp_path / "c.jsonl", texts(24, 6)), write(tmp_path / "d.jsonl", texts(30, 6))
    config = {
        "model": {"class_path": "LoRA", "init_args": {"base": str(decoder)}},
        "data": {
            "class_path": "CausalLMData",
            "init_args": {
                "train": {a: 0.7, b: 0.3},
                "validation": {"one": one, "two": [two]},
                "validation_monitor": "two",
            },
        },
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "run.yaml", "--data.train", f"[{a}, {b}]", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["train"] == [a, b]
    assert main(["fit", "--config", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert "examples of an epoch" in out and "val_loss/one" in out and "best val_loss" in out


def test_sources_of_different_forms_give_the_same_examples(decoder: Path, tmp_path: Path) -> None:
    pairs = write(tmp_path / "a.jsonl", [{"instruction": "a film", "input": "", "output": "good"}])
    chat = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "good"}]
    chats = write(tmp_path / "b.jsonl", [{"messages": chat}])
    made = lit_peft.InstructionData(
        base=str(decoder),
        train=[pairs, chats],
        chat_template="{% for m in messages %}{{ m.content }} </s>{% endfor %}",
        validation_fraction=0.0,
    )
    made.setup("fit")
    first, second = (dict(example) for example in made.examples("train"))
    assert first == second
