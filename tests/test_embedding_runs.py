"""Embeddings from YAML and Python: runs, resuming, sentence-transformers, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import yaml
from models import QUIET

import lit_peft
from lit_peft import LitPeftError
from lit_peft.cli import main
from lit_peft.data import EmbeddingData, TextClassificationData

WORDS = ["film", "story", "acting", "good", "bad", "great", "poor", "weak", "wonderful", "awful", "well"]


def sentence(*numbers: int) -> str:
    return " ".join(["the", WORDS[numbers[0] % 11], "is", *(WORDS[number % 11] for number in numbers[1:])])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 queries; the document of each has the same words in another order, and its negative has others."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for index in range(72):
        one, two, three = index, index // 11 + index * 3, index // 5 + 1
        rows.append(
            {
                "query": sentence(one, two, three),
                "document": sentence(three, one, two),
                "negatives": [sentence(one + 5, two + 1, three + 3)],
            }
        )
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def fit(base: Path, train: Path, out: Path, resume: Any = None, method: str = "LoRA", **given: Any) -> Any:
    pl.seed_everything(0)
    settings = {"learning_rate": 3e-3, **({"r": 4} if method == "LoRA" else {}), **given.pop("model", {})}
    module = getattr(lit_peft, method)(base=str(base), task="embedding", **settings)
    rows = EmbeddingData(
        base=str(base), train=str(train), **{"max_length": 16, "batch_size": 8, **given.pop("data", {})}
    )
    trainer = pl.Trainer(**{**QUIET, "default_root_dir": out, "max_epochs": 2, **given})
    trainer.fit(module, rows, ckpt_path=resume)
    return trainer


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}


def test_a_run_from_a_file_trains_tests_and_predicts(
    encoder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "LoRA",
            "init_args": {
                "base": str(encoder),
                "task": "embedding",
                "task_args": {"mini_batch_size": 8, "symmetric": True},
                "learning_rate": 1e-2,
            },
        },
        "data": {
            "class_path": "EmbeddingData",
            "init_args": {"train": str(pairs), "predict": str(pairs), "max_length": 16},
        },
        "trainer": {"max_epochs": 12, "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": "runs"},
    }
    data: Any = config["data"]
    data["init_args"]["prefixes"] = {"anchor": "great: ", "positive": "good: "}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    data["init_args"] = {"test": str(pairs), "max_length": 16, "prefixes": data["init_args"]["prefixes"]}
    Path("test.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--config", "test.yaml"]) == 0
    before = capsys.readouterr().out
    assert main(["fit", "--config", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert "anchor 'query', positive 'document', negatives 'negatives'" in out and "val_ndcg_10" in out
    last = next(path for path in Path("runs").rglob("last.ckpt"))
    assert main(["test", "--config", "test.yaml", "--ckpt_path", str(last)]) == 0
    after = capsys.readouterr().out
    scores = [float(text.split("test_ndcg_10")[1].split("│")[1]) for text in (before, after)]
    assert scores[1] > scores[0] + 0.05
    assert main(["predict", "--config", "run.yaml", "--ckpt_path", str(last)]) == 0
    assert "'query' get the prefix 'great: '" in capsys.readouterr().out
    rows = [json.loads(line) for file in Path("runs").rglob("predictions.jsonl") for line in file.open()]
    assert len(rows) == 72 and all(len(row["embedding"]) == 32 for row in rows)
    assert sum(value**2 for value in rows[0]["embedding"]) == pytest.approx(1, abs=1e-5)


def test_a_run_resumes_bit_for_bit(encoder: Path, pairs: Path, tmp_path: Path) -> None:
    model: dict[str, Any] = {"task_args": {"mini_batch_size": 8}, "lr_scheduler": "constant", "warmup_steps": 0}
    whole = fit(encoder, pairs, tmp_path / "whole", model=model)
    fit(encoder, pairs, tmp_path, max_epochs=1, model=model).save_checkpoint(tmp_path / "half.ckpt")
    again = fit(encoder, pairs, tmp_path, tmp_path / "half.ckpt", model=model)
    one, other = trained(whole), trained(again)
    assert again.global_step == whole.global_step
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    # The size of mini-batches may change, like everything that only costs memory.
    model["task_args"] = {"mini_batch_size": 20}
    assert fit(encoder, pairs, tmp_path, tmp_path / "half.ckpt", model=model).global_step == whole.global_step


def test_steps_of_accumulated_batches_are_weighted_by_their_rows(encoder: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = fit(encoder, pairs, tmp_path, accumulate_grad_batches=3, max_epochs=1)
    assert trainer.global_step == 3 and trainer.callback_metrics["val_ndcg_10"].isfinite()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_learns(precision: Any, encoder: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = fit(encoder, pairs, tmp_path, precision=precision, max_epochs=4)
    start = fit(encoder, pairs, tmp_path, precision=precision, max_epochs=1, limit_train_batches=1)
    assert trainer.callback_metrics["train_loss"] < start.callback_metrics["train_loss"]
    assert trainer.callback_metrics["val_ndcg_10"].dtype == torch.float32


def test_a_decoder_pools_its_last_token(decoder: Path, pairs: Path, tmp_path: Path) -> None:
    found = [
        fit(
            decoder,
            pairs,
            tmp_path,
            max_epochs=3,
            data={"padding_side": side},
            model={"task_args": {"pooling": "last"}, "target_modules": "all-linear"},
        ).callback_metrics
        for side in ("left", "right")
    ]
    for name, tolerance in {"train_loss": 1e-3, "val_ndcg_10": 1e-2}.items():
        assert found[0][name].item() == pytest.approx(found[1][name].item(), abs=tolerance)


def test_a_data_module_of_another_task_is_refused(encoder: Path, pairs: Path, tmp_path: Path) -> None:
    module = lit_peft.LoRA(base=str(encoder), task="embedding")
    columns = {"text_column": "query", "label_column": "document"}
    data = TextClassificationData(base=str(encoder), train=str(pairs), validation_fraction=0, **columns)
    with pytest.raises(LitPeftError, match="has no use for TextClassificationData, whose rows"):
        pl.Trainer(**QUIET, default_root_dir=tmp_path).fit(module, data)


def test_a_stream_trains(encoder: Path, pairs: Path, tmp_path: Path) -> None:
    data = {"streaming": True, "validation": str(pairs), "validation_fraction": 0.0, "prefixes": {"anchor": "a "}}
    trainer = fit(encoder, pairs, tmp_path, data=data, max_epochs=-1, max_steps=12, val_check_interval=6)
    assert trainer.global_step == 12 and trainer.callback_metrics["val_recall_10"] > 0.3


def test_several_validation_sets_of_different_forms(encoder: Path, pairs: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scored.jsonl"
    rows = [{"sentence1": sentence(i, 2), "sentence2": sentence(3, i), "score": i % 5 / 4} for i in range(20)]
    scored.write_text("\n".join(map(json.dumps, rows)))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(
        "\n".join(json.dumps({"question": f"is {sentence(i)}", "answer": sentence(i)}) for i in range(9))
    )
    data = {"validation": {"search": str(held_out), "similar": str(scored)}, "validation_monitor": "search"}
    trainer = fit(encoder, pairs, tmp_path, data=data, max_epochs=1)
    found = trainer.callback_metrics
    assert {"val_ndcg_10/search", "val_ndcg_10", "val_spearman/similar", "val_loss/search"} <= found.keys()
    assert "val_ndcg_10/similar" not in found and "val_loss/similar" not in found


# ------------------------------------------------------------------------------------------------ sentence-transformers


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_sentence_transformers_gives_the_same_embeddings(
    kind: str, pairs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    base = request.getfixturevalue(kind)
    pooling = "mean" if kind == "encoder" else "last"
    model = {"task_args": {"pooling": pooling}, "target_modules": "all-linear"}
    trainer = fit(base, pairs, tmp_path, max_epochs=1, model=model, data={"predict": str(pairs)})
    predicted = trainer.predict(trainer.lightning_module, datamodule=trainer.datamodule)
    ours = [row["embedding"] for rows in predicted for row in rows]
    trainer.lightning_module.save_adapter(tmp_path / "adapter")
    texts = [json.loads(line)["query"] for line in pairs.open()]

    transformer = Transformer(str(base))
    theirs = SentenceTransformer(
        modules=[transformer, Pooling(32, "mean" if kind == "encoder" else "lasttoken"), Normalize()], device="cpu"
    )
    untrained = theirs.encode(texts, convert_to_tensor=True)
    theirs.load_adapter(str(tmp_path / "adapter"))
    found = theirs.encode(texts, convert_to_tensor=True)
    assert (untrained - torch.tensor(ours)).abs().max() > 1e-3
    torch.testing.assert_close(found, torch.tensor(ours), atol=1e-5, rtol=0)

    folders = ["--base", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *folders, "--pooling", pooling]) == 0
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(merged.encode(texts, convert_to_tensor=True), torch.tensor(ours), atol=1e-5, rtol=0)
    kind_of_model = type(transformers.AutoModel.from_pretrained(tmp_path / "merged")).__name__
    assert kind_of_model == {"encoder": "BertModel", "decoder": "LlamaModel"}[kind]


def test_merge_refuses_options_without_effect(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["--base", str(encoder), "--adapter", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["merge", *base, "--normalize", "false"]) == 2
    assert "--normalize has no effect without --pooling" in capsys.readouterr().err
    assert main(["merge", *base, "--pooling", "mean", "--task", "causal_lm"]) == 2
    assert "--pooling is for task embedding" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- several processes


def run(processes: int, *arguments: Any) -> None:
    command = [sys.executable, str(Path(__file__).with_name("embedding_run.py")), *map(str, arguments)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("strategy", "loss_type", "size"),
    [
        ("ddp", "in_batch_negatives", 0),
        ("ddp", "in_batch_negatives", 5),
        ("ddp", "cosent", 0),
        ("ddp", "triplet", 0),
        ("fsdp2", "in_batch_negatives", 0),
        ("fsdp2", "in_batch_negatives", 8),
    ],
)
def test_two_processes_train_on_the_whole_batch(
    strategy: str, loss_type: str, size: int, encoder: Path, pairs: Path, tmp_path: Path
) -> None:
    """The loss, its gradients and the metrics are those of a single process with all rows."""
    base = tmp_path / "base"
    shutil.copytree(encoder, base)
    config = json.loads((base / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (base / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in pairs.open()]
    if loss_type == "cosent":
        rows = [{**row, "score": index % 7 / 6} for index, row in enumerate(rows)]
        for row in rows:
            del row["negatives"]
    elif strategy == "ddp" and loss_type == "in_batch_negatives":  # shards need as many forward passes on each process
        rows = [{**row, "negatives": row["negatives"] * (index % 3)} for index, row in enumerate(rows)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run(1, "auto", tmp_path / "one.pt", base, data, loss_type, 0)
    run(2, strategy, tmp_path / "two.pt", base, data, loss_type, size)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5) and len(one["losses"]) == 3
    for kind in ("gradients", "trained"):
        assert one[kind].keys() == two[kind].keys() and one[kind]
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert one["metrics"].keys() == two["metrics"].keys()
    for name in ("val_ndcg_10", "val_recall_1", "val_spearman"):
        if name in one["metrics"]:
            assert two["metrics"][name].item() == pytest.approx(one["metrics"][name].item(), abs=1e-5)
