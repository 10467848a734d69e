"""Tests and predicts on every task, in as many processes as torchrun starts: `evaluate_run.py FOLDER OUT DIE`.

FOLDER holds the bases and files that `test_processes.py` makes. Writes OUT/metrics.json and OUT/predictions.jsonl. With
DIE over 0, the second process dies at its batch of that number, while predicting."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lit_peft.callbacks import PredictionWriter

import lit_peft
from lit_peft import CausalLMData, MultipleChoiceData, ReasoningData, Seq2SeqData, TextClassificationData


def answered(tokenizer: Any) -> None:
    """Let what is generated be an answer that hangs on the prompt: the tiny tokenizer has no digits."""
    decode = tokenizer.batch_decode

    def batch_decode(ids: Any, **settings: Any) -> list[str]:
        texts: list[str] = decode(ids, **settings)
        return texts if ids.shape[1] != 3 else [f"The answer is {sum(row) % 3}." for row in ids.tolist()]

    tokenizer.batch_decode = batch_decode


def main(folder: Path, out: Path, die: int) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    encoder, decoder, t5 = (str(folder / name) for name in ("encoder", "decoder", "t5"))
    common: dict[str, Any] = {"batch_size": 2}
    runs: dict[str, tuple[Any, str, str]] = {}
    for name, labels in (("two", ["neg", "pos"]), ("three", ["a", "b", "c"])):
        rows = TextClassificationData(base=encoder, test=str(folder / f"{name}.csv"), labels=labels, **common)
        runs[name] = (rows, "sequence_classification", encoder)
    number = TextClassificationData(base=encoder, test=str(folder / "number.csv"), regression=True, **common)
    runs["number"] = (number, "sequence_classification", encoder)
    choices = MultipleChoiceData(base=encoder, test=str(folder / "choices.jsonl"), **common)
    runs["choices"] = (choices, "multiple_choice", encoder)
    named: dict[str, Any] = {"test": str(folder / "multirc.jsonl"), "benchmark": "super_glue/multirc"}
    asked = TextClassificationData(base=encoder, labels=["0", "1"], **named, **common)
    runs["multirc"] = (asked, "sequence_classification", encoder)
    # A process is left without a row.
    one = TextClassificationData(
        base=encoder, labels=["0", "1"], **{**named, "test": str(folder / "one.jsonl")}, **common
    )
    runs["one"] = (one, "sequence_classification", encoder)
    named = {"test": str(folder / "record.jsonl"), "benchmark": "super_glue/record"}
    runs["record"] = (MultipleChoiceData(base=encoder, **named, **common), "multiple_choice", encoder)
    text = CausalLMData(base=decoder, test=str(folder / "two.csv"), **common)
    runs["text"] = (text, "causal_lm", decoder)
    runs["pairs"] = (Seq2SeqData(base=t5, test=str(folder / "pairs.jsonl"), **common), "seq2seq", t5)
    sums = ReasoningData(base=decoder, test=str(folder / "sums.json"), max_new_tokens=3, **common)
    answered(sums.tokenizer)
    runs["sums"] = (sums, "causal_lm", decoder)

    def trainer(*callbacks: pl.Callback) -> pl.Trainer:
        return pl.Trainer(
            devices=world,
            strategy=pl.strategies.DDPStrategy(process_group_backend="gloo") if world > 1 else "auto",
            accelerator="cpu",
            callbacks=list(callbacks),
            default_root_dir=out,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    metrics = {}
    for name, (data, task, base) in runs.items() if not die else ():
        pl.seed_everything(0)
        settings = {"generation": {"max_new_tokens": 3}} if task in ("seq2seq", "causal_lm") else {}
        module = lit_peft.LoRA(base=base, task=task, **settings)
        writer = PredictionWriter(str(out / f"{name}.jsonl"))
        metrics[name] = trainer(writer).test(module, data, verbose=False)[0]
    if not die and int(os.environ.get("RANK", 0)) == 0:
        (out / "metrics.json").write_text(json.dumps(metrics))

    class Module(lit_peft.LoRA):  # type: ignore[misc,name-defined]
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if die and self.global_rank == 1 and batch_idx == die:
                os._exit(9)
            return super().predict_step(batch, batch_idx)

    pl.seed_everything(0)
    module = Module(base=decoder, task="causal_lm", generation={"max_new_tokens": 3})
    rows = CausalLMData(base=decoder, predict=str(folder / "long.csv"), **common)
    trainer(PredictionWriter(str(out / "predictions.jsonl"))).predict(module, rows, return_predictions=False)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
