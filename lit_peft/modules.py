"""The LightningModules: `lit_peft.modules.LoRA` and one for every other method in `lit_peft.methods.registry`.

Each is a `BaseLM` whose `__init__` also takes the method's settings. They are built when they are first used, so that
their names are known without importing torch; `modules.pyi` describes them to type checkers and editors.
"""

from __future__ import annotations

from typing import Any

from lit_peft.methods.registry import METHODS, mixin_class

__all__ = list(METHODS)


def __getattr__(name: str) -> Any:
    if name not in METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lit_peft.training.module import BaseLM

    about = {"__module__": __name__, "__doc__": METHODS[name].summary}
    return globals().setdefault(name, type(name, (mixin_class(name), BaseLM), about))


def __dir__() -> list[str]:
    return sorted({*globals(), *METHODS})
