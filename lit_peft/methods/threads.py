"""Threads that share a model: one at a time may change its adapters, while no other thread computes.

Whatever changes a model (`set_adapter`, `attach`, `merge`, blocks like `row_adapters`) holds the model's lock, so other
threads wait before they change it. Once a second thread has changed a model, hooks on it count its forwards: a change
waits for those of other threads that are running, and forwards that would use another thread's adapter are refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lit_peft.methods.attachment import Attachment, attachment_or_none
from lit_peft.util.errors import LitPeftError

# How long a thread waits for another one's block, so that threads that wait for each other do not hang forever.
PATIENCE_SECONDS = 600.0
Function = TypeVar("Function", bound=Callable[..., Any])


class _Choice(threading.local):
    """The adapter that a thread has set."""

    is_made = False
    adapter: Attachment | None = None


class _Access:
    """Who changes a model and who calls it. Not stored on the model, which must be possible to copy and pickle."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.first = threading.get_ident()
        self.depth = 0
        self.is_watched = False
        self.choice = _Choice()
        self.changed_by: int | None = None
        # Guards the two below.
        self.gate = threading.Condition(threading.Lock())
        self.owner: int | None = None
        self.running: set[int] = set()

    def claim(self) -> bool:
        """Refuse new forwards of other threads, and wait for those that run; return whether they have ended."""
        me = self.changed_by = threading.get_ident()

        def nobody_runs() -> bool:
            self.running &= {thread.ident for thread in threading.enumerate()}
            return not self.running - {me}

        with self.gate:
            self.owner = me
            return self.gate.wait_for(nobody_runs, PATIENCE_SECONDS)

    def release(self) -> None:
        with self.gate:
            self.owner = None


_ACCESS: WeakKeyDictionary[nn.Module, _Access] = WeakKeyDictionary()
_ACCESS_LOCK = threading.Lock()


@contextmanager
def locked(model: nn.Module) -> Iterator[_Access]:
    """Let no other thread change a model in the block, and wait until none does. It may nest.

    Raises:
        LitPeftError: another thread has been in such a block for `PATIENCE_SECONDS`.
    """
    with _ACCESS_LOCK:
        access = _ACCESS.setdefault(model, _Access())
    if not access.lock.acquire(timeout=PATIENCE_SECONDS):
        raise _waited_too_long(model)
    try:
        yield access
    finally:
        access.lock.release()


@contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Let only this thread change and call a model in the block. It may nest.

    Raises:
        LitPeftError: another thread has been in such a block, or has computed, for `PATIENCE_SECONDS`.
    """
    with locked(model) as access:
        if threading.get_ident() != access.first and not access.is_watched:
            access.is_watched = True
            model.register_forward_pre_hook(_begin, prepend=True)
            model.register_forward_hook(_end, always_call=True)
        access.depth += 1
        try:
            if access.depth == 1 and not access.claim():
                raise _waited_too_long(model)
            yield
        finally:
            access.depth -= 1
            if access.depth == 0:
                access.release()


def _waited_too_long(model: nn.Module) -> LitPeftError:
    return LitPeftError(
        f"Another thread has used this {type(model).__name__} for {PATIENCE_SECONDS:.0f} s, in a forward or in a block "
        "like row_adapters or use_adapter: it must end before this thread can change the model's adapters."
    )


def exclusive(function: Function) -> Function:
    """Decorate a function that changes the model it gets first: other threads wait for it."""

    @wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with changing(model):
            return function(model, *args, **kwargs)

    return cast(Function, call)


def remember_adapter(model: nn.Module) -> None:
    """Note that this thread has set the adapter that is active now. The caller is in a `changing` block."""
    choice = _ACCESS[model].choice
    choice.is_made, choice.adapter = True, attachment_or_none(model)


def _begin(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: refuse a forward that would not use the adapter that its thread expects."""
    access = None if torch.compiler.is_compiling() else _ACCESS.get(model)
    if access is None:  # a copy of the model, which no thread has changed yet
        return
    me = threading.get_ident()
    with access.gate:
        if access.owner not in (None, me):
            raise LitPeftError(
                "Another thread is changing the adapters of this model, e.g. in a row_adapters or use_adapter block. A "
                "forward outside of a block would use that thread's adapter: call the model in a block of its own, "
                "which waits."
            )
        switched = access.choice.is_made and attachment_or_none(model) is not access.choice.adapter
        if switched and access.changed_by != me:
            raise LitPeftError(
                "Another thread has switched the adapter since this thread called set_adapter: use `with "
                "lit_peft.use_adapter(model, name):` in each thread."
            )
        access.running.add(me)


def _end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook, also called after an error: threads that wait for the end of this forward go on."""
    access = None if torch.compiler.is_compiling() else _ACCESS.get(model)
    if access is not None:
        with access.gate:
            access.running.discard(threading.get_ident())
            access.gate.notify_all()
