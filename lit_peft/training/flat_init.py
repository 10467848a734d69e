"""The `__init__` of a method's module: `BaseLM`'s arguments and the method's settings side by side."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from lit_peft.util.errors import LitPeftError, closest


def flat_init(cls: type[Any], base: type[Any]) -> Any:
    """Return an `__init__` for `cls` that takes the arguments of `base` and the fields of `cls.settings_class`.

    Args:
        cls: a subclass of `base` with a `settings_class`, whose settings it stores as `settings`.
        base: the class with an ordinary `__init__`.
    """
    settings_class = cls.settings_class
    hints, own = get_type_hints(base.__init__), list(inspect.signature(base.__init__).parameters.values())
    parameters = [parameter.replace(annotation=hints.get(parameter.name, Any)) for parameter in own]
    settings_hints = get_type_hints(settings_class)
    for field in fields(settings_class):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        annotation = settings_hints[field.name]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=annotation))
    names = [parameter.name for parameter in parameters[1:]]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in names]
        if not args and "base" not in kwargs:
            raise LitPeftError(f"{type(self).__name__} needs a base: a hub id, a model folder, or pkg:DISTRIBUTION.")
        if unknown:
            raise LitPeftError(
                f"{type(self).__name__} has no setting {unknown[0]!r}: the closest are {closest(unknown[0], names)}."
            )
        settings, rest = cls.split_settings(kwargs)
        object.__setattr__(self, "settings", settings)
        base.__init__(self, *args, **rest)

    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    documented = [ancestor for ancestor in settings_class.__mro__ if "__dataclass_fields__" in vars(ancestor)]
    arguments = [_argument_docs(ancestor) for ancestor in (*documented, base)]
    __init__.__doc__ = "Build the module.\n\nArgs:\n" + "\n".join(filter(None, arguments))
    return __init__


def _argument_docs(documented: type[Any]) -> str:
    """Return the "Args:" section of a class's docstring, indented by four."""
    text = inspect.cleandoc(documented.__doc__ or "")
    _, _, after = text.partition("Args:\n")
    return after.split("\n\n")[0]
