"""What a module notes during one forward pass, for each thread apart."""

from __future__ import annotations

import threading
from typing import Any


class CallState(threading.local):
    """Base of classes whose attributes have a value of their own in each thread.

    A subclass declares them with their initial values. A copy, pickled or not, starts with those.
    """

    def __init__(self) -> None:
        # Python calls this in each thread. `torch.compile` relies on attributes being there from the start.
        self.__dict__.update({name: value for name, value in vars(type(self)).items() if not name.startswith("__")})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
