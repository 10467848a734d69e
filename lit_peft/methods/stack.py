"""Adapters stacked in each layer, as in MAD-X: the next one adapts what the one before it returned.

MAD-X (arXiv:2005.00052), section 2: a language adapter, learned from text by masked language modeling, lies under a
task adapter. The language adapter is frozen while the task adapter is trained, and replaced by that of another language
afterwards. A stack consists of named adapters, which are saved and loaded one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_peft.methods.changes import PutBelow
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from lit_peft.methods.attachment import Attachment


@dataclass(frozen=True, init=False)
class Stack:
    """Adapters that are active one after the other in each layer, for `set_adapter` and `use_adapter`.

    At each place (after the attention, after the FFN) an adapter takes the output of the one before it for the output
    of the sublayer, with the same residual and LayerNorm, as with `Stack` of AdapterHub. An adapter that has no
    bottleneck at a place is left out there. The last adapter is the one that is trained and saved; those before it are
    frozen as long as the stack is active.

    Args:
        *names: the adapters, the one that comes first in each layer first, e.g. `Stack("language", "task")`. They are
            bottleneck adapters: AdapterH, AdapterP or Parallel.

    Raises:
        LitPeftError: there are fewer than two names, or one occurs twice.
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise LitPeftError(
                f"Stack{names!r}: give the names of two or more different adapters, the first one first."
            )
        object.__setattr__(self, "names", names)

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.names))})"


def names_of(active: str | Stack | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of the active adapters; of a stack, the trained one last."""
    if active is None:
        return ()
    return active if isinstance(active, tuple) else active.names if isinstance(active, Stack) else (active,)


def check_stack(attachments: Mapping[str, Attachment]) -> None:
    """Refuse adapters that cannot be stacked.

    Args:
        attachments: the adapters by name, the one that is trained last.

    Raises:
        LitPeftError: names the first one that cannot, and why.
    """
    *below, _ = attachments
    for name, attachment in attachments.items():
        settings = attachment.settings
        if not settings.stacks:
            raise LitPeftError(
                f"The adapter {name!r} ({settings.method}) cannot be in a stack: only bottleneck adapters can, which "
                "are AdapterH, AdapterP and Parallel."
            )
        if name in below and settings.trainable_token_indices:
            raise LitPeftError(
                f"The adapter {name!r} has tokens of its own, so no other adapter can be stacked on it: train it "
                "without trainable_token_indices and add_tokens."
            )
        if name in below and not getattr(settings, "original_ln_after", True):
            raise LitPeftError(
                f"The adapter {name!r} has original_ln_after=False, so it ends its layer and no other adapter can be "
                "stacked on it: make it the last one of the stack."
            )


def put_below(attachment: Attachment, below: list[Attachment]) -> None:
    """Let a suspended adapter, whenever it is on the model, have others under it, the first one first."""
    attachment.changes[:0] = [PutBelow(other, place) for place, other in enumerate(below)]


def clear_below(attachment: Attachment) -> None:
    """Undo `put_below`; the adapter is suspended."""
    attachment.changes[:] = [change for change in attachment.changes if not isinstance(change, PutBelow)]
