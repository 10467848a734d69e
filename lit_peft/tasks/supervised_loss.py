"""The loss of a causal LM computed on its supervised positions alone.

    hidden [batch, length, d] ── rows that a label supervises ──> head ──> finish ──> cross-entropy
                                                                  W      scale, soft cap

The model's own code runs, whatever the architecture: hooks give its head the supervised rows only, and its
`loss_function` answers with the loss of those rows. Where the head is a frozen linear layer and what the model does to
the logits afterwards is recognized, the logits of all rows never exist at once (`lit_peft.nn.cross_entropy`).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.cross_entropy import head_cross_entropy
from lit_peft.tasks import supervised_ffn
from lit_peft.tasks.supervised_ffn import SupervisedRows, last_ffn

# (scale, soft cap) that a model puts on its logits; None where it does something else.
Finish = tuple[float, float | None]
_FINISHES: WeakKeyDictionary[nn.Module, Finish | None] = WeakKeyDictionary()


@contextmanager
def supervised_loss(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within this context, `model(..., labels=labels).loss` costs the supervised positions alone.

    Loss and gradients are those of the model's own loss, `num_items_in_batch` and `shift_labels` included; the output's
    `logits` are None. Calls without labels, models whose loss is not transformers' next-token loss, and compiled models
    run as they are.

    Args:
        model: a transformers causal LM, with a method attached or not, or a wrapper that has it as `module`.
        enabled: whether to do anything at all.
    """
    while not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    head = _head(model) if enabled else None
    if head is None:
        yield
        return
    step = _Step(model, head)
    ffn = last_ffn(model) if supervised_ffn.SUPERVISED_FFN else None
    handles = [
        *(SupervisedRows(step.rows).attach(ffn) if ffn is not None else ()),
        model.register_forward_pre_hook(step.before_model, with_kwargs=True),
        head.register_forward_pre_hook(step.before_head),
        # Before any other hook: a sharded head lets its weight go in its own.
        head.register_forward_hook(step.after_head, prepend=True),
        model.register_forward_hook(step.after_model),
    ]
    try:
        yield
    finally:
        step.restore()
        for handle in handles:
            handle.remove()


def _head(model: nn.Module) -> nn.Module | None:
    """The model's output head, where its loss is the next-token loss of what the head gives."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "loss_function"):
        return None
    if getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss" or model._compiled_call_impl is not None:
        return None
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return None
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    return head if "self.loss_function(" in source else None


class _Step:
    """One call of the model, from hook to hook."""

    def __init__(self, model: Any, head: Any) -> None:
        self.model, self.head = model, head
        self.labels: Tensor | None = None
        self.sum: Tensor | None = None
        self.active = self.shows_states = False
        self.places: tuple[torch.Size, Tensor, Tensor] | None = None

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.restore()
        self.labels = kwargs.get("labels")
        kept = kwargs.get("logits_to_keep", 0)
        if not isinstance(self.labels, Tensor) or not isinstance(kept, int) or kept or torch.compiler.is_compiling():
            self.labels = None
            return
        self.shifted = kwargs.get("shift_labels")
        self.ignored = kwargs.get("ignore_index", -100)
        self.shows_states = _shows_states(self.model, kwargs)

    def find(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """The numbers of the supervised rows of (batch, length, d) and their targets; None where labels do not fit."""
        if self.labels is None:
            return None
        if self.places is None or self.places[0] != hidden.shape[:2]:
            targets = F.pad(self.labels, (0, 1), value=self.ignored)[..., 1:] if self.shifted is None else self.shifted
            # A prompt in front of the tokens has no labels.
            targets = F.pad(targets, (hidden.shape[1] - targets.shape[1], 0), value=self.ignored)
            if targets.shape != hidden.shape[:2]:
                return None
            targets = targets.reshape(-1).to(hidden.device)
            rows = (targets != self.ignored).nonzero().squeeze(1)
            self.places = hidden.shape[:2], rows, targets[rows]
        return self.places[1:]

    def rows(self, hidden: Tensor) -> Tensor | None:
        """The rows that the last FFN has to compute."""
        found = None if self.shows_states else self.find(hidden)
        return None if found is None else found[0]

    def before_head(self, head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.active or args[0].dim() != 3:
            return None
        hidden: Tensor = args[0]
        found = self.find(hidden)
        if found is None:
            return None
        rows, self.targets = found
        self.hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
        self.active, self.sum, self.extra = True, None, 0
        self.own_loss = vars(self.model).get("_loss_function")
        self.model.loss_function = self.loss
        if not _frozen_linear(head):
            return (self.hidden[None], *args[1:])
        if self.model in _FINISHES and _FINISHES[self.model] is not None:
            # The head still answers for one row: the model's code goes on from its logits.
            return (hidden[:1, :1].detach(), *args[1:])
        if self.model in _FINISHES or not len(rows):
            return (self.hidden[None], *args[1:])
        # The first time, one row more, with logits so large that a soft cap shows.
        row = self.hidden[:1].detach()
        with torch.no_grad():
            row = row * (50 / F.linear(row, head.weight.to(row.dtype)).abs().max().clamp(min=1e-6))
        self.extra = 1
        return (torch.cat([self.hidden, row])[None], *args[1:])

    def after_head(self, head: Any, args: tuple[Any, ...], logits: Tensor) -> None:
        if not self.active:
            return
        finish = _FINISHES.get(self.model) if _frozen_linear(head) else None
        if finish is not None:
            self.sum = head_cross_entropy(self.hidden, head.weight, self.targets, head.bias, *finish)
        elif self.extra:
            self.probe = logits[0, -1].detach()

    def loss(
        self,
        logits: Tensor,
        labels: Any = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Tensor:
        """In place of the model's `loss_function`: the logits are those of the supervised rows, or of one row."""
        if self.sum is not None:
            total = self.sum
        else:
            finish = None
            if self.extra:
                finish = _FINISHES[self.model] = _find_finish(self.model, self.probe, logits[0, -1].detach())
                logits = logits[:, :-1]
            weight = self.head.weight
            if finish is not None and _frozen_linear(self.head) and weight.untyped_storage().size():
                # To the bit what later steps compute: the first step of a resumed run is a later one of another's.
                total = head_cross_entropy(self.hidden, weight, self.targets, self.head.bias, *finish)
            else:  # or a sharded head has let its weight go
                total = F.cross_entropy(
                    logits[0].to(torch.promote_types(logits.dtype, torch.float32)), self.targets, reduction="sum"
                )
        # Without a supervised token the loss is zero, not 0/0.
        count = len(self.targets) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1))

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active and isinstance(output, OrderedDict) and "logits" in output:
            # Logits of some rows are of no use to anybody.
            OrderedDict.__delitem__(output, "logits")
            output.logits = None  # type: ignore[attr-defined]
        self.restore()

    def restore(self) -> None:
        """Give the model its own loss back."""
        self.labels = self.places = None
        if self.active:
            self.active = False
            if self.own_loss is None:
                del self.model._loss_function
            else:
                self.model.loss_function = self.own_loss
            self.hidden = self.targets = self.sum = None  # type: ignore[assignment]


def _shows_states(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether somebody asked for the layers' outputs, and so for all rows of them."""
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(getattr(model, "config", None), "output_hidden_states", False) if asked is None else asked)


def _frozen_linear(head: nn.Module) -> bool:
    return (
        isinstance(head, nn.Linear)
        and type(head.weight) is nn.Parameter
        and head.weight.is_floating_point()
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


def _find_finish(model: nn.Module, raw: Tensor, finished: Tensor) -> Finish | None:
    """The scale and soft cap that turned the head's logits into the model's: those its config names, if they do."""
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
