"""What a module notes during one forward pass, for each thread apart."""

from __future__ import annotations

import threading
from typing import Any


class CallState(threading.local):
    """Base of classes whose attributes have a value of their own in each thread.

    A subclass declares them with their initial values. A copy, pickled or not, starts with those.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
