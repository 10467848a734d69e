"""Embeddings: pooling, losses, gradients and metrics are those of sentence-transformers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import ALL, AUTO, DECODERS, ENCODERS, METHODS
from torch import Tensor

import lit_peft
from lit_peft import LitPeftError
from lit_peft.nn.contrastive import pool
from lit_peft.tasks import find_task
from lit_peft.tasks.retrieval import retrieval_metrics


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
        torch.testing.assert_close(
            value, other[name], atol=1e-5 * largest, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


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
def test_padding_and_virtual_tokens_are_no_part_of_the_text(name: str, method: str, pooling: str, folder: Path) -> None:
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


@pytest.mark.parametrize("size", [4, 5, 64])
@pytest.mark.parametrize("negatives", [0, 2])
def test_mini_batches_give_the_gradients_of_the_cached_loss(negatives: int, size: int, folder: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    columns = [
        {name: torch.nn.functional.pad(v, (0, 12 - v.shape[1])) for name, v in c.items()}
        for c in COLUMNS[: 2 + negatives]
    ]
    whole = built("LoRA", saved("bert", folder))
    module = built("LoRA", saved("bert", folder), mini_batch_size=size)
    loss = module.training_step(joined(*columns), 0)
    loss.backward()
    found = gradients(module)
    expected = whole.training_step(joined(*columns), 0)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    close(found, gradients(whole))
    wrapped: Any = Wrapped(module, "mean", normalize=False)
    cached = CachedMultipleNegativesRankingLoss(wrapped, scale=20.0, mini_batch_size=size)
    expected = cached([dict(column) for column in columns], torch.empty(0))
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    close(found, gradients(module))


def test_dropout_is_the_same_when_activations_are_computed_again(folder: Path) -> None:
    """Else the gradient would not be that of the loss: a step along it would not lower this very loss."""
    module = built("LoRA", saved("bert", folder), mini_batch_size=4).train()
    batch = joined(*COLUMNS[:1], *COLUMNS[2:])

    def loss() -> Tensor:
        torch.manual_seed(3)
        return module.training_step(batch, 0).double()

    loss().backward()
    name, parameter = next((n, p) for n, p in module.named_parameters() if p.grad is not None and "lora_B" in n)
    gradient = parameter.grad.clone()
    at = gradient.abs().argmax()
    with torch.no_grad():
        values = []
        for step in (1e-2, -1e-2):
            parameter.view(-1)[at] += step
            values.append(loss())
            parameter.view(-1)[at] -= step
    slope = (values[0] - values[1]) / 2e-2
    torch.testing.assert_close(slope.float(), gradient.view(-1)[at], atol=1e-3, rtol=2e-2, msg=lambda m: f"{name}: {m}")


def peak(step: Callable[[], Tensor]) -> int:
    """The most bytes that a loss and its backward pass have in new tensors at once."""
    alive: dict[int, int] = {}
    most = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
                if storage is not None and storage._cdata not in alive:
                    alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, alive.pop, storage._cdata, None)
            most = max(most, sum(alive.values()))
            return out

    with Watch():
        step().backward()
    return most


def test_memory_of_a_batch_is_that_of_a_mini_batch(folder: Path) -> None:
    """As in sentence-transformers' cached loss."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    base = saved("bert", folder)
    columns = [{**texts(rows, seed), "attention_mask": torch.ones(rows, 9).long()} for rows, seed in ((64, 1), (64, 2))]
    module, small = built("LoRA", base, mini_batch_size=8), built("LoRA", base)
    wrapped: Any = Wrapped(small, "mean", normalize=False)
    cached = CachedMultipleNegativesRankingLoss(wrapped, mini_batch_size=8)
    plain = peak(lambda: small.training_step(joined(*columns), 0))
    theirs = peak(lambda: cached([dict(column) for column in columns], torch.empty(0)).requires_grad_())
    ours = peak(lambda: module.training_step(joined(*columns), 0))
    assert ours < plain / 4
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_triplets_are_those_of_triplet_loss(distance: str, normalize: bool, folder: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import TripletLoss
    from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric

    settings = {"loss_type": "triplet", "distance": distance, "normalize": normalize, "margin": 0.5}
    module = built("LoRA", saved("bert", folder), **settings)
    columns = [COLUMNS[0], COLUMNS[2], COLUMNS[3]]
    loss = module.training_step(joined(*columns), 0)
    loss.backward()
    found = gradients(module)
    metric: Any = getattr(TripletDistanceMetric, distance.upper())
    criterion = TripletLoss(Wrapped(module, "mean", normalize), metric, 0.5)  # type: ignore[arg-type]
    expected = criterion([dict(column) for column in columns], torch.empty(0))
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert loss > 0
    close(found, gradients(module))


@pytest.mark.parametrize("kind", ["cosine", "cosent"])
def test_scored_pairs_are_cosine_similarity_and_cosent(kind: str, folder: Path) -> None:
    from sentence_transformers.sentence_transformer import losses

    module = built("LoRA", saved("bert", folder), loss_type=kind)
    columns = [COLUMNS[0], COLUMNS[2]]
    scores = torch.tensor([0.1, 0.9, 0.4, 0.4, 1.0, 0.0])
    loss = module.training_step(joined(*columns, scores=scores), 0)
    loss.backward()
    found = gradients(module)
    wrapped: Any = Wrapped(module, "mean")
    criterion = losses.CosineSimilarityLoss(wrapped) if kind == "cosine" else losses.CoSENTLoss(wrapped)
    expected = criterion([dict(column) for column in columns], scores)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    close(found, gradients(module))


def test_texts_that_occur_twice_are_no_negatives_of_one_another(folder: Path) -> None:
    """The loss with repeated texts is that of a softmax over the candidates that remain."""
    module = built("LoRA", saved("bert", folder), temperature=0.1, symmetric=True)
    anchors, positives, negatives = texts(5, 1), texts(5, 2), texts(5, 3)
    for name in anchors:
        positives[name][3] = positives[name][0]  # the same positive
        anchors[name][4] = anchors[name][1]  # the same anchor with another positive
        negatives[name][2] = positives[name][2]  # a negative that is another row's positive, and a row's own
    batch = joined(anchors, positives, negatives)
    with torch.no_grad():
        loss = module.training_step(batch, 0)
        a, p, n = module(**batch).embeddings.split(5)
    left_out = {(0, 3), (3, 0), (1, 4), (4, 1), (2, 7)}
    scores = torch.exp(a @ torch.cat([p, n]).T / 0.1)
    for row, column in left_out:
        scores[row, column] = 0
    back = torch.exp(p @ a.T / 0.1)
    for row, column in [(0, 3), (3, 0), (1, 4), (4, 1)]:
        back[row, column] = 0
    forward = -(scores.diagonal() / scores.sum(1)).log().mean()
    expected = (forward - (back.diagonal() / back.sum(1)).log().mean()) / 2
    torch.testing.assert_close(loss, expected)


def test_the_loss_is_precise_under_autocast(folder: Path) -> None:
    module = built("LoRA", saved("bert", folder))
    batch = joined(*COLUMNS[:1], *COLUMNS[2:])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = module(**batch)
        loss = module.task.loss(output, batch)
    assert output.embeddings.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, module.task.loss(output, batch))


# ------------------------------------------------------------------------------------------------------------ metrics


def test_retrieval_is_that_of_the_evaluator(folder: Path) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    torch.manual_seed(0)
    names = [f"q{index % 30}" for index in range(40)], [f"d{index % 35}" for index in range(40)]
    vectors = {name: torch.nn.functional.normalize(torch.randn(8), dim=0) for name in {*names[0], *names[1]}}
    relevant: dict[str, set[str]] = {}
    for query, document in zip(*names, strict=True):
        relevant.setdefault(query, set()).add(document)

    class Encoder:
        similarity_fn_name = "cosine"
        model_card_data = None

        def encode_query(self, sentences: list[str], **_: Any) -> Tensor:
            return torch.stack([vectors[name] for name in sentences])

        encode_document = encode = encode_query

    evaluator = InformationRetrievalEvaluator(
        {name: name for name in relevant},
        {name: name for name in sorted(set(names[1]))},
        relevant,
        precision_recall_at_k=[1, 5, 10],
        ndcg_at_k=[10],
        write_csv=False,
        score_functions={"cosine": lambda a, b: a @ b.T},
    )
    expected = evaluator.compute_metrices(Encoder())["cosine"]  # type: ignore[arg-type]
    metrics = retrieval_metrics()
    key = {name: hash(name) % 2**48 for name in vectors}
    for start in range(0, 40, 7):  # in batches
        batch = [part[start : start + 7] for part in names]
        queries, documents = (torch.stack([vectors[name] for name in part]) for part in batch)
        metrics["ndcg_10"].update(queries, documents, *(torch.tensor([key[name] for name in part]) for part in batch))
        for name in ("recall_1", "recall_5", "recall_10"):
            metrics[name].update()
    for k in (1, 5, 10):
        assert metrics[f"recall_{k}"].compute().item() == pytest.approx(expected["recall@k"][k], abs=1e-6)
    assert metrics["ndcg_10"].compute().item() == pytest.approx(expected["ndcg@k"][10], abs=1e-6)
    metrics["recall_1"].reset()
    assert not metrics["ndcg_10"].shared.queries


def test_metrics_of_dead_embeddings_are_nan(folder: Path) -> None:
    module = built("LoRA", saved("bert", folder))
    batch = joined(*COLUMNS[:1], *COLUMNS[2:])
    module.validation_step(dict(batch), 0)
    assert module.val_metrics["ndcg_10"].compute().isfinite()
    next(p for p in module.parameters() if p.requires_grad).data.fill_(float("nan"))
    module.validation_step(dict(batch), 0)
    assert all(module.val_metrics[name].compute().isnan() for name in ("loss", "recall_1", "ndcg_10"))


def test_spearman_is_that_of_the_evaluator(folder: Path) -> None:
    from scipy.stats import spearmanr

    module = built("LoRA", saved("bert", folder), loss_type="cosent")
    scores = torch.tensor([0.1, 0.9, 0.4, 0.3, 1.0, 0.0])
    batch = joined(COLUMNS[0], COLUMNS[2], scores=scores)
    module.validation_step(dict(batch), 0)
    with torch.no_grad():
        anchors, positives = module(**batch).embeddings.split(6)
    cosines = torch.nn.functional.cosine_similarity(anchors, positives)
    expected = spearmanr(cosines.numpy(), scores.numpy()).statistic
    assert module.val_metrics["spearman"].compute().item() == pytest.approx(expected, abs=1e-5)
    assert not module.val_metrics["ndcg_10"].update_called
    assert module.task.monitor == ("val_spearman", "max")


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("method", [*METHODS, "FullFineTuning"])
def test_every_method_learns(method: str, name: str, folder: Path) -> None:
    module = built(method, saved(name, folder), {"learning_rate": 3e-3}, pooling="mean", mini_batch_size=4)
    frozen = {key: value.clone() for key, value in module.named_parameters() if not value.requires_grad}
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(8):
        loss = module.training_step(joined(*COLUMNS[:1], *COLUMNS[2:]), 0)
        optimizer.zero_grad()
        loss.backward()
        # Else DDP would wait for a gradient that never comes.
        assert all(value.grad is not None for value in module.parameters() if value.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(dict(module.named_parameters())[key], value) for key, value in frozen.items())


def test_gradient_checkpointing_within_mini_batches_changes_nothing(folder: Path) -> None:
    found = []
    for settings in ({}, {"gradient_checkpointing": True}):
        module = built("LoRA", saved("llama", folder), settings, pooling="last", mini_batch_size=4).train()
        module.training_step(joined(*COLUMNS[:1], *COLUMNS[2:]), 0).backward()
        found.append(gradients(module))
    close(found[1], found[0])


def test_encoder_decoders_are_used_without_their_decoder_or_refused(folder: Path) -> None:
    for method in METHODS:
        module = built(method, saved("t5", folder))
        assert type(module.model).__name__ == "T5EncoderModel"
        module.training_step(joined(*COLUMNS[:1], *COLUMNS[2:]), 0).backward()
        assert all(value.grad is not None for value in module.parameters() if value.requires_grad)
    with pytest.raises(LitPeftError, match="no encoder of model_type='bart' alone: choose"):
        built("LoRA", saved("bart", folder))


def test_a_pooler_that_the_base_lacks_is_not_trained(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    module = built("LoRA", str(tmp_path))
    assert not any("pooler" in name for name, value in module.named_parameters() if value.requires_grad)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is not known: use mean, last, cls"),
        ({"loss_type": "softmax"}, "loss_type='softmax' is not known: use in_batch_negatives"),
        ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
        ({"mini_batch_size": 0}, "mini_batch_size=0: give a number above 0"),
        ({"margin": 0.5}, "margin has no effect with loss_type='in_batch_negatives': leave it out"),
        ({"loss_type": "triplet", "symmetric": True}, "symmetric has no effect with loss_type='triplet'"),
        ({"loss_type": "cosine", "temperature": 0.1}, "temperature has no effect with loss_type='cosine'"),
        ({"pool": "mean"}, "task_args has 'pool', which task='embedding' does not have: use 'pooling'"),
        ({"normalize": "yes"}, "task_args: normalize"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LitPeftError) as found:
        find_task("embedding", given)
    assert message in str(found.value)


def test_what_cannot_work_is_refused_before_the_base_is_loaded() -> None:
    with pytest.raises(LitPeftError, match="has no head to train alone"):
        lit_peft.HeadOnly(base="nowhere", task="embedding")
    with pytest.raises(LitPeftError, match=r"neftune_noise_alpha=5\.0 and mini_batch_size"):
        lit_peft.LoRA(base="nowhere", task="embedding", neftune_noise_alpha=5.0, task_args={"mini_batch_size": 4})


@pytest.mark.parametrize(
    ("loss_type", "columns", "more", "message"),
    [
        ("in_batch_negatives", 1, {}, "needs an anchor and a positive"),
        ("in_batch_negatives", 2, {"scores": torch.ones(6)}, "has no use for the rows' scores"),
        ("triplet", 2, {}, "needs a negative in each row"),
        ("cosine", 2, {}, "needs a score in each row"),
        ("cosent", 3, {"scores": torch.ones(6)}, "has no use for the rows' negatives"),
    ],
)
def test_rows_of_another_form_are_refused(
    loss_type: str, columns: int, more: dict[str, Any], message: str, folder: Path
) -> None:
    module = built("LoRA", saved("bert", folder), loss_type=loss_type)
    chosen = [COLUMNS[0], *COLUMNS[2:]][:columns]
    batch = joined(*chosen, **more) if columns > 1 else dict(chosen[0])
    with pytest.raises(LitPeftError, match=message):
        module.training_step(batch, 0)
