"""Write the type stubs of the modules whose names are made or imported when they are first used.

    python tools/make_stubs.py           # write the files
    python tools/make_stubs.py --check   # write nothing; the exit status says whether they are up to date

Type checkers and editors read `lit_peft/__init__.pyi`, `lit_peft/modules.pyi` and those of `data` and `callbacks`
instead of the code. `tests/test_types.py` compares them with what this tool makes from the code.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import lit_peft
from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.registry import METHODS, mixin_class, settings_class

ROOT = Path(__file__).parents[1]
HEAD = '"""{}"""\n\n# Made by tools/make_stubs.py from the code. Do not edit.\n\n'


def lazy_package(name: str) -> str:
    """The stub of a package with lazy names: each is imported from the module that defines it."""
    package = import_module(name)
    names: Mapping[str, str] = package._NAMES
    lines = [f"from {names[public]} import {public} as {public}" for public in sorted(names)]
    if hasattr(package, "__version__"):
        lines.append("\n__version__: str")
    public = "".join(f'    "{public}",\n' for public in package.__all__)
    return HEAD.format((package.__doc__ or "").splitlines()[0]) + "\n".join(lines) + f"\n\n__all__ = [\n{public}]\n"


def method_modules() -> str:
    """The stub of `lit_peft.modules`: one class per method, with every argument of its `__init__`."""
    classes = [_module_class(name) for name in METHODS]
    imports = {f"from {settings_class(name).__module__} import {name}Settings" for name in METHODS}
    imports |= {f"from {_mixin(name).__module__} import {_mixin(name).__name__}" for name in METHODS}
    lines = [
        "from collections.abc import Mapping, Sequence",
        "from typing import Any, Literal\n",
        *sorted(imports),
        "from lit_peft.training.module import BaseLM\n",
    ]
    document = (import_module("lit_peft.modules").__doc__ or "").splitlines()[0]
    return HEAD.format(document) + "\n".join(lines) + "\n" + "\n".join(classes)


def _mixin(name: str) -> type[MethodMixin]:
    """The mixin that the stub names: a method without its own has `MethodMixin`."""
    mixin = mixin_class(name)
    return mixin if hasattr(import_module(mixin.__module__), mixin.__name__) else MethodMixin


def _module_class(name: str) -> str:
    cls = getattr(lit_peft, name)
    parameters = inspect.signature(cls.__init__).parameters
    lines = [f"class {name}({_mixin(name).__name__}, BaseLM):"]
    lines += [f'    """{METHODS[name].summary}"""\n', f"    settings: {name}Settings\n"]
    lines += ["    def __init__(", *(f"        {text}," for text in _arguments(parameters)), "    ) -> None:"]
    # Its own settings; those of BaseLM, which follow, are documented there.
    document = inspect.cleandoc(cls.__init__.__doc__).partition("\n    base: ")[0] + "\n    base, ...: see `BaseLM`."
    document = document.replace("\n", "\n        ")
    lines.append(f'        """{document}\n        """')
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


def _arguments(parameters: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    keyword_only = False
    for parameter in parameters.values():
        if parameter.name == "self":
            yield "self"
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        text = f"{parameter.name}: {type_text(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            simple = default is None or isinstance(default, bool | int | float | str)
            text += f" = {_value_text(default)}" if simple else " = ..."
        yield text


def _value_text(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def type_text(hint: Any) -> str:
    """A type as an annotation that needs only `Any`, `Literal`, `Mapping` and `Sequence` to be imported."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return "Any"
    if hint is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_text, parts))
    if origin is Literal:
        return f"Literal[{', '.join(map(_value_text, parts))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if part is ... else type_text(part) for part in parts)}]"
    if isinstance(hint, type) and hint.__module__ in ("builtins", "collections.abc"):
        return hint.__name__
    raise TypeError(f"{hint!r} has no text for a stub: add it to tools/make_stubs.py")


def stubs() -> dict[Path, str]:
    """The text of every stub by its file."""
    return {
        ROOT / "lit_peft" / "__init__.pyi": lazy_package("lit_peft"),
        ROOT / "lit_peft" / "modules.pyi": method_modules(),
        ROOT / "lit_peft" / "data" / "__init__.pyi": lazy_package("lit_peft.data"),
        ROOT / "callbacks" / "__init__.pyi": lazy_package("lit_peft.callbacks"),
    }


def main() -> int:
    changed = [file for file, text in stubs().items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in changed:
        print(file.relative_to(ROOT))
        if "--check" not in sys.argv:
            file.write_text(stubs()[file], encoding="utf-8")
    return bool(changed) if "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
