"""Metrics of retrieval: where the right documents of each query are among all documents of a set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from lit_peft.tasks.base import Float32Metric

# Queries that are scored at once, so that the scores of all queries never exist together.
_QUERIES = 256
# Numbers that identify texts are stored as two parts of so many bits, which float32 represents exactly.
_BITS = 24


class Retrieval(Float32Metric):
    """Recall@k and nDCG@k of queries and their documents, over all batches and processes.

    Texts with the same key are one text. A query's right documents are those that came with it; all others are wrong.
    Documents are ranked by their dot product with the query. The embeddings are kept in float32: 8·d bytes for each
    pair of a query and a document.
    """

    full_state_update = False
    queries: list[Tensor]
    documents: list[Tensor]
    keys: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Flat, because a process without a row gathers an empty tensor of one dimension.
        for name in ("queries", "documents", "keys"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, queries: Tensor, documents: Tensor, query_keys: Tensor, document_keys: Tensor) -> None:
        """Add pairs: embeddings [pairs, d], and numbers [pairs] that are equal for equal texts."""
        self.queries.append(queries.flatten().to(self.dtype))
        self.documents.append(documents.flatten().to(self.dtype))
        keys = torch.stack([query_keys, document_keys], 1)
        low = 2**_BITS - 1
        self.keys.append(torch.stack([(keys >> _BITS) & low, keys & low], 2).flatten().to(self.dtype))

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the value of each metric by name, e.g. `recall_10`."""
        parts = dim_zero_cat(self.keys).long().view(-1, 2, 2)
        keys = (parts[..., 0] << _BITS) | parts[..., 1]
        shape = (len(keys), -1)
        queries, query = _distinct(dim_zero_cat(self.queries).view(shape), keys[:, 0])
        documents, document = _distinct(dim_zero_cat(self.documents).view(shape), keys[:, 1])
        # A pair as one number.
        right = (query * len(documents) + document).unique()
        counts = (right // len(documents)).bincount(minlength=len(queries))
        found = []
        for start in range(0, len(queries), _QUERIES):
            best = (queries[start : start + _QUERIES] @ documents.T).topk(min(10, len(documents))).indices
            rows = torch.arange(start, start + len(best), device=best.device)[:, None]
            found.append(torch.isin(rows * len(documents) + best, right))
        hits = torch.cat(found).to(self.dtype)
        values = {f"recall_{k}": (hits[:, :k].sum(1) / counts).mean() for k in (1, 5, 10)}
        gains = 1 / torch.arange(2, 12, device=hits.device, dtype=self.dtype).log2()
        ideal = gains.cumsum(0)[counts.clamp(max=10) - 1]
        values["ndcg_10"] = ((hits * gains[: hits.shape[1]]).sum(1) / ideal).mean()
        return {name: self.or_nan(value) for name, value in values.items()}


class RetrievalScore(Float32Metric):
    """One value of a `Retrieval` that several metrics share.

    Args:
        name: the value's name.
        shared: holds the embeddings. Updating, computing and resetting it a second time changes nothing.
    """

    full_state_update = False

    def __init__(self, name: str, shared: Retrieval) -> None:
        super().__init__()
        self.name, self.shared = name, shared

    def update(self, *values: Any) -> None:
        """Add pairs, see `Retrieval`; of the metrics that share it, one is given them and the others nothing."""
        if values:
            self.shared.update(*values)

    def compute(self) -> Tensor:
        return self.or_nan(self.shared.compute()[self.name])

    def reset(self) -> None:
        """Forget all pairs."""
        super().reset()
        shared: nn.Module | None = getattr(self, "shared", None)  # not yet there when the class is built
        if isinstance(shared, Retrieval):
            shared.reset()


def retrieval_metrics() -> dict[str, RetrievalScore]:
    """Return new metrics by name, which share the embeddings."""
    shared = Retrieval()
    return {name: RetrievalScore(name, shared) for name in ("recall_1", "recall_5", "recall_10", "ndcg_10")}


def _distinct(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row of each key, and for each row the number of its key."""
    values, number = keys.unique(return_inverse=True)
    first = torch.full_like(values, len(rows)).scatter_reduce(
        0, number, torch.arange(len(rows), device=keys.device), "amin"
    )
    return rows[first], number
