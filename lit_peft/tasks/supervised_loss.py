"""The loss of a causal LM, computed only on its supervised positions.

    hidden [batch, length, d] ── rows that a label supervises ──> head ──> finish ──> cross-entropy
                                                                  W      scale, soft cap

The model's own code runs, whatever the architecture: hooks give its head only the supervised rows, and its
`loss_function` returns the loss of those rows. If the head is a frozen linear layer, and what the model does to the
logits afterwards is recognized, the logits of all rows never exist at once (`lit_peft.nn.cross_entropy`). A task that
needs the log-probability of each token, and not only their mean, gets it in the same way (`token_log_probs`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_peft.models.transformers_internals import (
    computes_next_token_loss,
    own_loss_function,
    set_own_loss_function,
)
from lit_peft.nn.cross_entropy import head_cross_entropy, head_log_probs
from lit_peft.nn.linear import is_frozen_linear
from lit_peft.nn.torch_internals import is_compiled, runs_last

# (scale, soft cap) that a model applies to its logits.
Finish = tuple[float, float | None]
# The model's attribute that holds its `SupervisedLoss`.
_KEY = "_lit_peft_supervised_loss"


@contextmanager
def supervised_loss(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within this context, `model(..., labels=labels).loss` is computed only on the supervised positions.

    Loss and gradients are those of the model's own loss, including `num_items_in_batch` and `shift_labels`; the
    output's `logits` are None. Calls without labels, models whose loss is not transformers' next-token loss, and
    compiled models run unchanged.

    Args:
        model: a transformers causal LM, with or without a method attached, or a wrapper that has it as `module`.
        enabled: False leaves the model unchanged.
    """
    if not enabled:
        yield
        return
    loss = SupervisedLoss.of(model)
    try:
        with loss.active():
            yield
    finally:
        loss.remove_hooks()


class SupervisedLoss:
    """Computes one model's loss on its supervised positions while it is active.

    What is known of the model is found out once; its hooks stay, and do nothing while it is not active.

    Args:
        model: a transformers model.

    Attributes:
        finish: the scale and soft cap of the model's logits; None while they are not known, or if they cannot be.
        probed: whether `finish` has been looked for, which the first call with a frozen linear head does.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.supported = hasattr(model, "get_output_embeddings") and computes_next_token_loss(model)
        self.head: nn.Module | None = None
        self.finish: Finish | None = None
        self.probed = False
        self.enabled = self.by_token = False
        self.handles: list[RemovableHandle] = []
        # The state of a call, from hook to hook.
        self.calling = self.probing = False
        self.labels: Tensor | None = None
        self.sum: Tensor | None = None
        self.own_loss: Any = None
        self.shifted: Tensor | None = None
        self.hidden = self.targets = self.rows = self.probe = torch.empty(0)
        self.shape = torch.Size()
        # The log-probabilities of the supervised tokens of the last call, and their places in its rows.
        self.found: tuple[Tensor, Tensor, torch.Size] | None = None

    @classmethod
    def of(cls, model: Any) -> SupervisedLoss:
        """Return the model's own `SupervisedLoss`, made the first time; of a wrapper, that of the model in it."""
        while not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        found = getattr(model, _KEY, None)
        if not isinstance(found, cls) or found.model is not model:
            found = cls(model)
            object.__setattr__(model, _KEY, found)
        return found

    @contextmanager
    def active(self) -> Iterator[None]:
        """Return a context in which the model's loss is computed this way, if the model allows it."""
        before = self.enabled
        self.enabled = self._place_hooks()
        try:
            yield
        finally:
            self.enabled = before
            self.end_call()

    def token_log_probs(self, run: Callable[[], Any], labels: Tensor) -> tuple[Any, Tensor]:
        """Run the model, and return the log-probabilities of the supervised tokens.

        Inside `active`, they come from the supervised rows of the head alone; else from the model's logits.

        Args:
            run: calls the model with these labels, and returns its output.
            labels: -100 where a token is not supervised, shape (batch, length).

        Returns:
            The output, and the log-probability of each label, in fp32 or higher and 0 where there is no label, shape
            (batch, length).
        """
        self.by_token, self.found = True, None
        try:
            output = run()
        finally:
            self.by_token = False
        if self.found is None:
            return output, _from_logits(output.logits, labels, not self.model.config.is_encoder_decoder)
        values, rows, shape = self.found
        self.found = None
        whole = values.new_zeros(shape).flatten().index_put((rows,), values).view(shape)
        # A row of the head predicts the token after it. Virtual tokens may come before the labels.
        return output, F.pad(whole[:, shape[1] - labels.shape[1] : -1], (1, 0))

    def remove_hooks(self) -> None:
        """Leave no hook on the model, unless an outer context is active."""
        if not self.enabled:
            for handle in self.handles:
                handle.remove()
            self.handles, self.head = [], None

    def _place_hooks(self) -> bool:
        """Hook the model and the head that it has now; return whether that is possible."""
        if not self.supported or is_compiled(self.model):
            return False
        # Somebody may have set another loss, or an adapter may have replaced the head, since the last call.
        if not self.calling and getattr(self.model.loss_function, "__name__", "") != "ForCausalLMLoss":
            return False
        head: nn.Module | None = self.model.get_output_embeddings()
        if head is not self.head:
            self.enabled = False
            self.remove_hooks()
        if head is not None and not self.handles:
            self.head = head
            self.handles = [
                self.model.register_forward_pre_hook(self.before_model, with_kwargs=True),
                head.register_forward_pre_hook(self.before_head),
                # Before any other hook: the hook of a sharded head frees its weight.
                head.register_forward_hook(self.after_head, prepend=True),
                self.model.register_forward_hook(self.after_model),
            ]
        return head is not None

    # ---------------------------------------------------------------------------------------- one call of the model

    @runs_last
    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: keep the labels."""
        if not self.enabled:
            return
        self.end_call()
        labels, kept = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        if isinstance(labels, Tensor) and isinstance(kept, int) and not kept and not torch.compiler.is_compiling():
            self.labels = labels
            self.shifted = kwargs.get("shift_labels")
            self.ignored = kwargs.get("ignore_index", -100)

    @runs_last
    def before_head(self, head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the head: give it only the supervised rows."""
        if not self.enabled or self.labels is None or self.calling or args[0].dim() != 3:
            return None
        hidden: Tensor = args[0]
        found = self._supervised_rows(self.labels, hidden)
        if found is None:
            return None
        self.rows, self.targets = found
        rows, self.shape = self.rows, hidden.shape[:2]
        self.hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
        self.calling = True
        self.own_loss = own_loss_function(self.model)
        self.model.loss_function = self.loss
        if not is_frozen_linear(head):
            return (self.hidden[None], *args[1:])
        if self.finish is not None:
            # The head still computes one row: the model's code needs some logits to continue with.
            return (hidden[:1, :1].detach(), *args[1:])
        if self.probed or not len(rows):
            return (self.hidden[None], *args[1:])
        # The first time there is one more row, with logits so large that a soft cap has an effect.
        row = self.hidden[:1].detach()
        with torch.no_grad():
            row = row * (50 / F.linear(row, head.weight.to(row.dtype)).abs().max().clamp(min=1e-6))
        self.probing = True
        return (torch.cat([self.hidden, row])[None], *args[1:])

    def after_head(self, head: Any, args: tuple[Any, ...], logits: Tensor) -> None:
        """Forward hook of the head: compute the loss while its weight is there."""
        if not self.enabled or not self.calling:
            return
        if self.finish is not None and is_frozen_linear(head):
            self.sum = self._of_head(head, self.finish)
        elif self.probing:
            self.probe = logits[0, -1].detach()

    def loss(
        self,
        logits: Tensor,
        labels: Any = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Tensor:
        """Take the place of the model's `loss_function`; the logits are those of the supervised rows, or of one row."""
        head: Any = self.head
        if self.sum is not None:
            total = self.sum
        else:
            finish = None
            if self.probing:
                finish = self.finish = find_finish(self.model, self.probe, logits[0, -1].detach())
                self.probed = True
                logits = logits[:, :-1]
            if finish is not None and is_frozen_linear(head) and head.weight.untyped_storage().size():
                # Computed exactly as in later calls: the first step of a resumed run is a later step of the whole run.
                total = self._of_head(head, finish)
            else:  # also if a sharded head has freed its weight
                precise = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
                total = F.cross_entropy(precise, self.targets, reduction="none" if self.by_token else "sum")
                total = self._keep(-total) if self.by_token else total
        # Without a supervised token the loss is zero, not 0/0.
        count = len(self.targets) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1))

    def _of_head(self, head: Any, finish: Finish) -> Tensor:
        """Return the sum of the losses of the supervised rows, and keep their log-probabilities if they are wanted."""
        arguments = (self.hidden, head.weight, self.targets, head.bias, *finish)
        return self._keep(head_log_probs(*arguments)) if self.by_token else head_cross_entropy(*arguments)

    def _keep(self, values: Tensor) -> Tensor:
        self.found = values, self.rows, self.shape
        return -values.sum()

    @runs_last
    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model: drop logits that are only those of some rows."""
        if not self.enabled:
            return
        if self.calling and isinstance(output, OrderedDict) and "logits" in output:
            OrderedDict.__delitem__(output, "logits")
            output.logits = None  # type: ignore[attr-defined]
        self.end_call()

    def end_call(self) -> None:
        """Forget the call, and restore the model's own loss."""
        if self.calling:
            set_own_loss_function(self.model, self.own_loss)
        self.calling = self.probing = False
        self.labels = self.sum = self.shifted = self.own_loss = None
        self.hidden = self.targets = self.rows = self.probe = torch.empty(0)
        self.shape = torch.Size()

    def _supervised_rows(self, labels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the supervised rows of (batch, length, d) and their targets; None if the labels do not fit.

        Rows are indices into the batch flattened to (batch · length, d).
        """
        targets = F.pad(labels, (0, 1), value=self.ignored)[..., 1:] if self.shifted is None else self.shifted
        # A prompt before the tokens has no labels.
        targets = F.pad(targets, (hidden.shape[1] - targets.shape[1], 0), value=self.ignored)
        if targets.shape != hidden.shape[:2]:
            return None
        targets = targets.reshape(-1).to(hidden.device)
        rows = (targets != self.ignored).nonzero().squeeze(1)
        return rows, targets[rows]


def _from_logits(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """Return the log-probability of each label under a model's logits; 0 where there is no label."""
    logits = logits[:, logits.shape[1] - labels.shape[1] :]
    if shifted:
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = labels
    supervised = targets != -100
    precise = logits[supervised].to(torch.promote_types(logits.dtype, torch.float32))
    values = -F.cross_entropy(precise, targets[supervised], reduction="none")
    whole = values.new_zeros(targets.shape).masked_scatter(supervised, values)
    return F.pad(whole, (1, 0)) if shifted else whole


def find_finish(model: nn.Module, raw: Tensor, finished: Tensor) -> Finish | None:
    """Return the scale and soft cap of the model's config that turn the head's logits into the model's, if any do.

    Args:
        model: a transformers model.
        raw: one row of the head's output.
        finished: the same row of the model's output.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scales = [
        getattr(config, "logit_scale", None),
        getattr(config, "lm_head_multiplier", None),
        1 / config.logits_scaling if getattr(config, "logits_scaling", None) else None,
        1.0,
    ]
    caps = [
        getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    ]
    tolerance = 1e-5 if raw.dtype in (torch.float32, torch.float64) else 2e-2
    for scale in scales:
        for cap in (*caps, None):
            if isinstance(scale, (int, float)) and (cap is None or cap > 0):
                guess = raw.float() * scale
                guess = guess if cap is None else cap * torch.tanh(guess / cap)
                if torch.allclose(guess, finished.float(), rtol=tolerance, atol=tolerance):
                    return float(scale), cap
    return None
