"""The suite's own rule (`conftest.py`): what is deprecated is an error where we call it, not where others do."""

from __future__ import annotations

import types
import warnings

import pytest


def module(name: str, code: str, **names: object) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(names)
    exec(code, vars(made))
    return made


OLD = module(
    "stranger.inner",
    "def old(): warnings.warn('old is deprecated', FutureWarning)\ndef outer(): old()",
    warnings=warnings,
)


def test_our_call_of_a_deprecated_function_is_an_error() -> None:
    for function in (OLD.old, OLD.outer):
        with pytest.raises(FutureWarning, match=r"old is deprecated \(called from .*test_deprecations.py:"):
            function()
    layer = module("torch.nn.modules.module", "def call(): old()", old=OLD.old)  # model(...)
    with pytest.raises(FutureWarning, match="called from"):
        layer.call()
    ours = module("lit_peft.made_up", "def call(): old()", old=OLD.old)
    with pytest.raises(FutureWarning, match="called from <string>:1"):
        ours.call()


def test_the_call_of_others_is_a_warning() -> None:
    others = module("other", "def call(): old()", old=OLD.old)
    with pytest.warns(FutureWarning, match="old is deprecated"):
        others.call()


def test_what_our_line_warns_of_is_an_error() -> None:
    """As C code and decorators do, of the line that calls them."""
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "base.py", 1, module="lit_peft.training.module")
