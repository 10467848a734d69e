"""The loss of a masked language model, computed only at the masked positions.

    hidden [batch, length, d] ── rows with a label ──> output embeddings ──> cross-entropy

The model's own code runs, whatever the architecture: a hook gives its output embeddings, the layer with a row for each
token of the vocabulary, only the rows to predict. If that layer is frozen and what it returns are the logits, the
logits of all rows never exist at once (`lit_peft.nn.cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lit_peft.nn.cross_entropy import head_cross_entropy
from lit_peft.nn.linear import is_frozen_linear
from lit_peft.nn.torch_internals import is_compiled

IGNORE = -100
# Elements of a block of logits when the best token of each row is looked for: 32 MB in fp32.
_BLOCK = 2**23


@dataclass
class MaskedOutput:
    """The result of a model at the masked positions.

    Attributes:
        loss: mean over the masked tokens, a scalar; zero if there are none.
        correct: number of masked tokens that are predicted exactly; None in training.
        logits: (masked tokens, vocabulary) if they were asked for, else None.
    """

    loss: Tensor
    correct: Tensor | None
    logits: Tensor | None = None


class MaskedLoss:
    """Computes one model's loss at its masked positions while it is active.

    Args:
        model: a transformers model with a masked-language-modeling head.

    Attributes:
        enabled: whether it is active.
        keep_logits: whether to return the logits of the masked positions instead of a loss.
        is_last: whether the model's logits are what its output embeddings return; None while that is not known. The
            first call with a frozen linear layer finds it out.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.enabled = self.keep_logits = False
        self.is_last: bool | None = None
        # The state of a call, from hook to hook.
        self.labels: Tensor | None = None
        self.hidden: Tensor | None = None
        self.sum: Tensor | None = None
        self.correct: Tensor | None = None
        self.raw: Tensor | None = None
        self.targets = torch.empty(0)

    @contextmanager
    def active(self, keep_logits: bool = False) -> Iterator[None]:
        """Return a context in which `MaskedLM` computes the loss in this way; compiled models run as they are."""
        before = self.enabled, self.keep_logits
        self.enabled, self.keep_logits = not is_compiled(self.model), keep_logits
        try:
            yield
        finally:
            self.enabled, self.keep_logits = before

    def __call__(self, batch: dict[str, Any]) -> MaskedOutput:
        """Run the model on a batch with `labels`, -100 where there is no mask."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
        self._begin(labels)
        handles = self._place_hooks()
        try:
            logits = self.model(**inputs).logits
        finally:
            for handle in handles:
                handle.remove()
        targets = labels[labels != IGNORE].to(logits.device)
        if self.keep_logits:
            rows = logits[labels != IGNORE] if self.hidden is None else logits.flatten(0, -2)
            self._begin(None)
            return MaskedOutput(rows.new_zeros(()), None, rows)
        if self.raw is not None:
            self.is_last = torch.equal(self.raw.float(), logits[0, -1].detach().float())
        if self.sum is None or not self.is_last:
            rows = logits[labels != IGNORE] if self.hidden is None else logits.flatten(0, -2)
            self._from_logits(rows, targets)
        assert self.sum is not None
        output = MaskedOutput(self.sum / max(len(targets), 1), self.correct)
        self._begin(None)
        return output

    def _begin(self, labels: Tensor | None) -> None:
        self.labels = labels
        self.hidden = self.sum = self.correct = self.raw = None
        self.targets = torch.empty(0)

    def _place_hooks(self) -> list[RemovableHandle]:
        """Hook the output embeddings that the model has now; an adapter may have replaced them."""
        head = self.model.get_output_embeddings()
        if head is None:
            return []
        # Before any other hook: the hook of a sharded layer frees its weight.
        return [head.register_forward_pre_hook(self._before), head.register_forward_hook(self._after, prepend=True)]

    def _before(self, head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the output embeddings: give them only the rows to predict."""
        labels, hidden = self.labels, args[0]
        if labels is None or hidden.dim() != 3 or hidden.shape[:2] != labels.shape or torch.compiler.is_compiling():
            return None
        is_masked = (labels != IGNORE).to(hidden.device)
        self.hidden, self.targets = hidden[is_masked], labels.to(hidden.device)[is_masked]
        if self.is_last and not self.keep_logits and is_frozen_linear(head):
            # One row still: the model's code needs some logits to continue with.
            return (hidden[:1, :1].detach(), *args[1:])
        return (self.hidden[None], *args[1:])

    def _after(self, head: Any, args: tuple[Any, ...], logits: Tensor) -> None:
        """Forward hook of the output embeddings: compute the loss while their weight is there."""
        if self.hidden is None or self.keep_logits or self.is_last is False or not is_frozen_linear(head):
            return
        if self.is_last is None:
            if not len(self.targets):
                return
            self.raw = logits[0, -1].detach()
        # The first call also computes the loss in this way: it may be a later step of a run that was resumed.
        self.sum = head_cross_entropy(self.hidden, head.weight, self.targets, head.bias)
        if not torch.is_grad_enabled():
            self.correct = self.sum.new_zeros(())
            rows = max(_BLOCK // len(head.weight), 1)
            for hidden, targets in zip(self.hidden.split(rows), self.targets.split(rows), strict=True):
                best = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).argmax(-1)
                self.correct += (best == targets).sum()

    def _from_logits(self, logits: Tensor, targets: Tensor) -> None:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.sum = F.cross_entropy(precise, targets, reduction="sum")
        self.correct = None if torch.is_grad_enabled() else (logits.argmax(-1) == targets).sum()
