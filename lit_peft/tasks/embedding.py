"""One vector for each text, so that similar texts have similar vectors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torchmetrics import Metric

from lit_peft.methods.attachment import MethodSettings, attachment_or_none
from lit_peft.models.call_arguments import arguments
from lit_peft.models.transformers_internals import has_model_class
from lit_peft.nn.autocast import without_autocast
from lit_peft.nn.contrastive import (
    Distance,
    Pooling,
    cosent_loss,
    cosine_similarity,
    gather,
    in_batch_negatives,
    pool,
    triplet_loss,
)
from lit_peft.tasks.base import Batch, Generation, Mean, Metrics, Task
from lit_peft.tasks.retrieval import retrieval_metrics
from lit_peft.tasks.sequence_classification import Spearman
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_CHOICES = {
    "pooling": ("mean", "last", "cls"),
    "loss_type": ("in_batch_negatives", "triplet", "cosine", "cosent"),
    "distance": ("cosine", "euclidean", "manhattan"),
}
# The settings that each loss has.
_USED = {
    "in_batch_negatives": ("temperature", "symmetric"),
    "triplet": ("margin", "distance"),
    "cosine": (),
    "cosent": ("temperature",),
}
# What a row may have or lack that a loss has no use for or needs.
_PROBLEMS = {
    "no score": "needs a score in each row: set data.score_column, or use in_batch_negatives",
    "score": "has no use for the rows' scores: use cosine or cosent, or set data.score_column to ''",
    "negative": "has no use for the rows' negatives: set data.negative_columns to []",
    "no negative": "needs a negative in each row: set data.negative_columns, remove rows without one, or use "
    "in_batch_negatives",
}


class Embedding(Task):
    """Embeddings of texts, for retrieval and similarity.

    Batches: `input_ids`, `attention_mask` [texts, length], the texts of all rows: anchors, then positives, then
    negatives; `texts`, the number of each of the three, a list. Optional: `owners` [negatives], the row of each
    negative; `keys` [texts], equal numbers for equal texts; `scores` [rows], the similarity of anchor and positive;
    `lengths`, the number of tokens of each text, a list, so that padding is cut off before the model runs. In a batch
    without `texts` every row is a text.

    Metrics: `loss`; without scores, `recall_1`, `recall_5`, `recall_10` and `ndcg_10` of finding each anchor's
    positives among all positives of the set; with scores, `spearman`. The loss of in-batch negatives depends on the
    batch size, and in validation the batch is that of one process. Prediction returns the `embedding` of each text.

    Encoder-decoders are used without their decoder, if transformers has a class for that (T5 and its relatives).

    Args:
        pooling: how a text's vector is made of its tokens': their `mean`, the `last` token, or the first one (`cls`).
        normalize: divide each vector by its length. Scores are dot products, so they are cosines then.
        loss_type: `in_batch_negatives`: choose each anchor's positive among those of the whole batch, of all processes,
            and all negatives (InfoNCE, `MultipleNegativesRankingLoss`). `triplet`: the positive is nearer than each of
            the row's negatives, of which each row needs one. `cosine`: squared difference of the cosine and the score
            (`CosineSimilarityLoss`). `cosent`: the order of the cosines is that of the scores (`CoSENTLoss`).
        temperature: what scores are divided by; 1 / `scale` of sentence-transformers; 0.05 if unset.
        symmetric: also choose each positive's anchor, and take the mean of both losses.
        margin: of `triplet`, by how much the positive is nearer; 0.3 if unset.
        distance: of `triplet`: `cosine` (if unset), `euclidean` or `manhattan`.
        mini_batch_size: texts that the model runs on at once (GradCache). The loss and its gradients are those of the
            whole batch; memory holds the activations of so many texts, and the model runs forward twice.

    Raises:
        LitPeftError: a setting is out of range, or has no effect with `loss_type`.
    """

    name = "embedding"
    auto_class = "AutoModel"
    unused = ("pooler",)
    extras = ("texts", "owners", "keys", "scores", "lengths")
    free_settings = ("mini_batch_size",)
    monitor = ("val_ndcg_10", "max")

    def __init__(
        self,
        pooling: Pooling = "mean",
        normalize: bool = True,
        loss_type: Literal["in_batch_negatives", "triplet", "cosine", "cosent"] = "in_batch_negatives",
        temperature: float | None = None,
        symmetric: bool = False,
        margin: float | None = None,
        distance: Distance | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        given = {"pooling": pooling, "loss_type": loss_type, "distance": distance or "cosine"}
        for name, value in given.items():
            if value not in _CHOICES[name]:
                raise LitPeftError(f"task_args: {name}={brief(value)} is not known: use {', '.join(_CHOICES[name])}.")
        unused = {"temperature": temperature is not None, "symmetric": symmetric}
        unused |= {"margin": margin is not None, "distance": distance is not None}
        for name, is_set in unused.items():
            if is_set and name not in _USED[loss_type]:
                raise LitPeftError(f"task_args: {name} has no effect with loss_type={loss_type!r}: leave it out.")
        for name, number in {"temperature": temperature, "margin": margin, "mini_batch_size": mini_batch_size}.items():
            if number is not None and not number > 0:
                raise LitPeftError(f"task_args: {name}={number}: give a number above 0.")
        self.pooling, self.normalize, self.loss_type, self.symmetric = pooling, normalize, loss_type, symmetric
        self.temperature = 0.05 if temperature is None else temperature
        self.margin = 0.3 if margin is None else margin
        self.distance: Distance = distance or "cosine"
        self.mini_batch_size = mini_batch_size
        self.needs_scores = loss_type in ("cosine", "cosent")
        if self.needs_scores:
            self.monitor = ("val_spearman", "max")
        # Virtual tokens that stand in place of this token are not part of the text.
        self.prompt_token_id: int | None = None

    def model_class(self, config: Any) -> Any:
        """Return `AutoModel`; for an encoder-decoder, the class of its encoder.

        Raises:
            LitPeftError: transformers has no class of the encoder alone.
        """
        if not getattr(config, "is_encoder_decoder", False):
            return super().model_class(config)
        import transformers

        if has_model_class("AutoModelForTextEncoding", config):
            return transformers.AutoModelForTextEncoding
        raise LitPeftError(
            f"task={self.name!r} uses an encoder-decoder without its decoder, and transformers has no encoder of "
            f"model_type={config.model_type!r} alone: choose an encoder, a decoder, or a T5."
        )

    def check_method(self, settings: MethodSettings) -> None:
        """Refuse to train the head alone, because there is none."""
        if settings.method == "head_only" and not settings.modules_to_save:
            raise LitPeftError(f"task={self.name!r} has no head to train alone: use another method, e.g. LoRA.")

    def check_data(self, data: Any) -> None:
        """Refuse rows without what the loss needs, or with what it has no use for.

        Raises:
            LitPeftError: names the first such row.
        """
        if not hasattr(data, "refuse_rows"):
            return
        refused = [("train", "no score"), ("train", "negative")] if self.needs_scores else [("train", "score")]
        if self.loss_type == "triplet":
            refused += [(split, "no negative") for split in ("train", "validation", "test")]
        data.refuse_rows({(split, kind): self._says(_PROBLEMS[kind]) for split, kind in refused})

    def _says(self, problem: str) -> str:
        return f"task_args: loss_type={self.loss_type!r} {problem}."

    def prepare(self, model: Any) -> None:
        """Also note which token virtual tokens stand in place of."""
        super().prepare(model)
        self.prompt_token_id = getattr(getattr(attachment_or_none(model), "settings", None), "prompt_token_id", None)

    # ------------------------------------------------------------------------------------- texts to embeddings

    def forward(self, model: Any, batch: Batch) -> Any:
        """Return `embeddings` [texts, d], in float32 at least, in the order of the batch.

        Raises:
            LitPeftError: the rows are too long for the model.
        """
        inputs = {name: value for name, value in batch.items() if name not in self.extras}
        plan = list(self._parts(batch))
        count = torch.tensor([len(plan)], device=batch["input_ids"].device)
        if self.group is not None and gather(count, self.group).unique().numel() > 1:  # without gradients, its own
            raise LitPeftError(
                "The rows have different numbers of negatives, so that processes with shards of the model would wait "
                "for one another: give every row equally many (data.negative_columns), or use strategy ddp."
            )
        parts, order = [], []
        for rows, length in plan:
            part = inputs if rows is None else {name: value[rows] for name, value in inputs.items()}
            # Zeros on the right are padding; their number is known without asking the device.
            part = part if length is None else {name: value[:, :length] for name, value in part.items()}
            order.append(rows)
            parts.append(super().forward(model, part))
        embeddings = torch.cat(parts)
        if order[0] is not None:
            place = torch.cat([rows for rows in order if rows is not None]).argsort()
            embeddings = embeddings[place]
        return SimpleNamespace(embeddings=embeddings)

    def _parts(self, batch: Batch) -> Iterator[tuple[Tensor | None, int | None]]:
        """Yield the rows that the model runs on at once, and the length of the longest; None: all, unknown."""
        ids, lengths = batch["input_ids"], batch.get("lengths")
        count = len(ids)
        if self.group is not None and not torch.is_grad_enabled():
            # Processes that have shards of the model run it equally often, whatever the sizes of their batches.
            groups = [list(range(count))]
            lengths = None
        elif lengths is None:
            groups = [list(range(count))]
        else:
            # Texts of similar lengths together.
            groups = [sorted(range(count), key=lengths.__getitem__, reverse=True)]
        if self.mini_batch_size is not None:
            size = self.mini_batch_size
            groups = [groups[0][start : start + size] for start in range(0, count, size)]
        elif lengths is not None and "texts" in batch:
            ends = torch.tensor(batch["texts"]).cumsum(0).tolist()
            groups = [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False) if end > start]
        if len(groups) == 1:
            yield None, None
            return
        for group in groups:
            longest = max(lengths[row] for row in group) if lengths is not None and self.pads_right else None
            yield torch.tensor(group, device=ids.device), longest

    def run(self, model: Any, batch: Batch) -> Any:
        """Return the embeddings of some texts; with `mini_batch_size`, their activations are computed again later."""
        if "use_cache" in arguments(model):
            batch = {"use_cache": False, **batch}
        if self.mini_batch_size is None or not torch.is_grad_enabled():
            return self._embed(model, batch)
        # The whole forward pass runs again: hooks that methods have on the model then see its end.
        with set_checkpoint_early_stop(False):
            return checkpoint(self._embed, model, batch, use_reentrant=False)

    def _embed(self, model: Any, batch: Batch) -> Tensor:
        hidden = model(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
        if self.prompt_token_id is not None:
            mask = mask * (batch["input_ids"] != self.prompt_token_id)
        with without_autocast(hidden.device):
            embeddings = pool(hidden, mask, self.pooling)
            return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    # --------------------------------------------------------------------------------------- loss and metrics

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the mean loss of a batch.

        Raises:
            LitPeftError: the batch is not of the form that `loss_type` compares.
        """
        self.check_form(batch)
        anchors, positives, negatives = self._columns(output.embeddings, batch)
        with without_autocast(anchors.device):
            if self.loss_type == "triplet":
                owners = batch["owners"]
                return triplet_loss(anchors[owners], positives[owners], negatives, self.margin, self.distance)
            if self.needs_scores:
                cosines, scores = cosine_similarity(anchors, positives), batch["scores"].to(anchors.dtype)
                if self.loss_type == "cosine":
                    return F.mse_loss(cosines, scores)
                return cosent_loss(cosines, scores, self.temperature, self.group)
            keys = None if batch.get("keys") is None else self._columns(batch["keys"], batch)
            return in_batch_negatives(anchors, positives, negatives, keys, self.temperature, self.symmetric, self.group)

    def check_form(self, batch: Batch) -> None:
        """Refuse a batch without the texts or scores that `loss_type` compares, or with scores that it ignores.

        Raises:
            LitPeftError: see above.
        """
        problem = None
        anchors, positives, negatives = batch.get("texts") or (0, 0, 0)
        if not positives or anchors != positives:
            problem = "needs an anchor and a positive in each row: set data.anchor_column and data.positive_column"
        elif self.needs_scores and "scores" not in batch:
            problem = _PROBLEMS["no score"]
        elif not self.needs_scores and "scores" in batch:
            problem = _PROBLEMS["score"]
        elif self.needs_scores and negatives:
            problem = _PROBLEMS["negative"]
        elif self.loss_type == "triplet" and (not negatives or len(batch["owners"].unique()) < anchors):
            problem = _PROBLEMS["no negative"]
        if problem is not None:
            raise LitPeftError(self._says(problem))

    def weight(self, batch: Batch) -> Tensor:
        anchors, _, negatives = batch["texts"]
        return torch.tensor(negatives if self.loss_type == "triplet" else anchors)

    def metrics(self, config: Any) -> dict[str, Metric]:
        with warnings.catch_warnings():
            # That it keeps two numbers for each row, which embeddings without scores do not even have.
            warnings.filterwarnings("ignore", "Metric `SpearmanCorr", UserWarning)
            return {"loss": Mean(), **retrieval_metrics(), "spearman": Spearman()}

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        """Update the loss, and the metrics that the form of the batch allows.

        Raises:
            LitPeftError: the batch has no pairs.
        """
        # A set of another form than the training rows has metrics, but not the loss.
        if self.needs_scores == ("scores" in batch):
            super().update(metrics, output, batch)
        anchors, positives, _ = self._columns(output.embeddings, batch)
        if "scores" in batch:
            metrics["spearman"].update(cosine_similarity(anchors, positives), batch["scores"].float())
        else:
            keys = batch.get("keys")
            if keys is None:
                raise LitPeftError(
                    "A batch has no `keys`, by which equal texts are known: use EmbeddingData, or add them."
                )
            metrics["ndcg_10"].update(anchors, positives, *self._columns(keys, batch)[:2])
            for name in ("recall_1", "recall_5", "recall_10"):
                metrics[name].update()
        bad = ~output.embeddings.isfinite().all()
        for metric in metrics.values():
            metric.non_finite += bad.to(metric.non_finite.device)

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        return [{"embedding": vector} for vector in self.forward(model, batch).embeddings.tolist()]

    def _columns(self, rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of the anchors, of the positives and of the negatives."""
        anchors, positives, negatives = rows.split(batch["texts"])
        return anchors, positives, negatives
