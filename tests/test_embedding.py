"""Embeddings: pooling, losses, gradients and metrics are those of sentence-transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import yaml
from models import ALL, AUTO, DECODERS, ENCODERS, QUIET
from torch import Tensor

import lit_peft
from lit_peft import LitPeftError
from lit_peft.cli import main
from lit_peft.data import EmbeddingData
from lit_peft.nn.contrastive import pool
from lit_peft.tasks import find_task
from lit_peft.tasks.retrieval import retrieval_metrics

METHODS = {
    "LoRA": {"r": 4},
    "AdapterH": {"reduction_factor": 4},
    "AdapterP": {"reduction_factor": 4},
    "Parallel": {"reduction_factor": 4},
    "PrefixTuning": {"num_virtual_tokens": 4},
    "PTuningV2": {"num_virtual_tokens": 4},
    "PTuning": {"num_virtual_tokens": 4},
    "PromptTuning": {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"},
}


def texts(rows: int, seed: int, length: int = 9) -> dict[str, Tensor]:
    """Random texts of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(5, 40, (rows, length), generator=generator) * mask, "attention_mask": mask}


def joined(*columns: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """A batch of anchors, positives and, in all further columns, negatives."""
    counts = [len(column["input_ids"]) for column in columns]
    ids = torch.cat([column["input_ids"] for column in columns])
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.cat([c["attention_mask"] for c in columns])}
    batch["texts"] = [counts[0], counts[1], sum(counts[2:])]
    batch["lengths"] = batch["attention_mask"].sum(1).tolist()
    batch["owners"] = torch.arange(sum(counts[2:])) % counts[0]
    batch["keys"] = torch.tensor([hash(tuple(row.tolist())) % 2**48 for row in ids])
    return {**batch, **more}


@cache
def saved(name: str, folder: Path) -> str:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": 1, "initializer_range": 0.2, **ALL[name]}
    config = transformers.AutoConfig.for_model(name.split()[0], **shape)
    kind = transformers.AutoModel if name in ENCODERS else AUTO[name]
    kind.from_config(config).save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def built(method: str, base: str, settings: dict[str, Any] | None = None, **task_args: Any) -> Any:
    torch.manual_seed(0)
    given = {**METHODS.get(method, {}), **(settings or {})}
    module = getattr(lit_peft, method)(base=base, task="embedding", task_args=task_args, **given)
    module.configure_model()
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:  # away from the start, where LoRA changes nothing
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def gradients(module: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    largest = max(value.abs().max() for value in other.values()).item()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-5 * largest, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Wrapped(torch.nn.Module):
    """The module's model as sentence-transformers calls one: a dictionary of features in, the embedding out."""

    def __init__(self, module: Any, pooling: str, normalize: bool = True) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        self.model = module.model
        self.pooling = Pooling(32, pooling)
        self.normalize = Normalize() if normalize else torch.nn.Identity()
        # What the cached losses ask of a model.
        self.device = torch.device("cpu")

    def __getitem__(self, index: int) -> Any:
        return [self, self.pooling][index]

    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask")
        hidden = self.model(**{name: features[name] for name in names}).last_hidden_state
        return self.normalize(self.pooling({**features, "token_embeddings": hidden}))


# ------------------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("mode", "name"), [("mean", "mean"), ("last", "lasttoken"), ("cls", "cls")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_that_of_sentence_transformers(mode: Any, name: Any, side: str, dtype: torch.dtype) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    hidden = torch.randn(6, 9, 16).to(dtype)
    mask = texts(6, 1)["attention_mask"]
    mask = mask if side == "right" else mask.flip(1)
    found = pool(hidden, mask, mode)
    expected = Pooling(16, name)({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.to(dtype), expected)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_and_virtual_tokens_are_no_part_of_the_text(
    name: str, method: str, pooling: str, folder: Path
) -> None:
    module = built(method, saved(name, folder), pooling=pooling)
    ids = torch.tensor([[7, 9, 11, 13, 15]])
    with torch.no_grad():
        hidden = module.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert hidden.shape[1] == 5
        expected = {"mean": hidden.mean(1), "last": hidden[:, -1], "cls": hidden[:, 0]}[pooling]
        expected = expected / expected.norm(dim=-1, keepdim=True)
        for left, right in [(0, 0), (0, 3), *([(3, 0)] if name in DECODERS else [])]:
            padded = torch.nn.functional.pad(ids, (left, right))
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
            found = module(input_ids=padded, attention_mask=mask).embeddings
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_virtual_tokens_in_place_of_a_token_are_not_pooled(folder: Path) -> None:
    settings = {"num_virtual_tokens": 2, "prompt_token_id": 60}
    module = built("PromptTuning", saved("bert", folder), settings)
    ids = torch.tensor([[7, 60, 60, 9, 11]])
    with torch.no_grad():
        hidden = module.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        found = module(input_ids=ids, attention_mask=torch.ones_like(ids)).embeddings
    expected = torch.nn.functional.normalize(hidden[:, [0, 3, 4]].mean(1), dim=-1)
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------------- losses

COLUMNS = [texts(6, 1), texts(6, 2, 12), texts(6, 3), texts(6, 4)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_in_batch_negatives_are_multiple_negatives_ranking(negatives: int, symmetric: bool, folder: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    module = built("LoRA", saved("bert", folder), symmetric=symmetric, temperature=0.1)
    columns = COLUMNS[: 2 + negatives]
    columns = [{name: torch.nn.functional.pad(v, (0, 12 - v.shape[1])) for name, v in c.items()} for c in columns]
    loss = module.training_step(joined(*columns), 0)
    loss.backward()
    found = gradients(module)
    directions: Any = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    mode: Any = "per_direction" if symmetric else "joint"
    wrapped: Any = Wrapped(module, "mean", normalize=False)
    criterion = MultipleNegativesRankingLoss(wrapped, scale=10.0, directions=directions, partition_mode=mode)
    expected = criterion([dict(column) for column in columns], torch.empty(0))
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    close(found, gradients(module))
