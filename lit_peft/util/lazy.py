"""Imports that are put off until they are needed, so that a package itself is quick to import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package (PEP 562) that imports its public names when they are first used.

    Args:
        package: the package's name.
        names: each public name and the module that defines it.
    """

    def get(name: str) -> Any:
        if name in names:
            return getattr(import_module(names[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get


def is_instance(value: object, module: str, *names: str) -> bool:
    """Return whether a value is an instance of another library's class, without importing that library.

    Args:
        value: any object. If the library is not imported, nothing can be an instance of its classes.
        module: the module that has the classes.
        names: the classes' names; those that this version of the library does not have are ignored.
    """
    loaded = sys.modules.get(module)
    return any(isinstance(value, found) for name in names if (found := getattr(loaded, name, None)) is not None)
