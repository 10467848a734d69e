"""`modules_to_save`: modules of the base that are trained in full."""

from __future__ import annotations

import warnings

from lit_peft.methods.attachment import Attachment, base_name
from lit_peft.methods.changes import tied_names
from lit_peft.util.errors import LitPeftError, closest


def train_modules(attachment: Attachment, names: tuple[str, ...] | list[str]) -> None:
    """Train every parameter of the named modules, or the named parameters.

    Args:
        attachment: makes and records the changes.
        names: a module matches by its full name or by the last parts of it. Where no module matches, the name may be
            the full name of a parameter.

    Raises:
        LitPeftError: a name matches neither a module with parameters nor a parameter.
    """
    model = attachment.model
    modules = [path for path, module in model.named_modules() if path and list(module.parameters())]
    own = {
        id(parameter)
        for each in (attachment, *attachment.below)
        for module in each.adapted.values()
        for path, parameter in module.named_parameters()
        if not path.startswith("base_layer.")
    }
    # Under all names of a tied parameter: which one the model computes with is not known.
    named = model.named_parameters(remove_duplicate=False)
    paths = [path for path, parameter in named if id(parameter) not in own]
    parameters = {base_name(path): path for path in paths}
    for name in names:
        matches = tuple(f"{path}." for path in modules if path == name or path.endswith("." + name))
        found = [path for path in paths if path.startswith(matches)] if matches else []
        if not found and name in parameters:
            found = [parameters[name]]
        if not found:
            raise LitPeftError(
                f"modules_to_save names {name!r}, but {type(model).__name__} has no module with parameters of that "
                f"name: the closest are {closest(name, [path.rpartition('.')[2] for path in modules])}."
            )
        for path in found:
            if path not in attachment.trained:
                _warn_if_tied(attachment, path, name)
                attachment.train(path)


def _warn_if_tied(attachment: Attachment, path: str, name: str) -> None:
    if attachment.ties:
        return
    # Not the second name that a head has for the bias of a layer in it.
    names = tied_names(attachment.model, path)
    tied = [other for other in names if not path.startswith(f"{other.rpartition('.')[0]}.")]
    if tied:
        warnings.warn(
            f"modules_to_save={name!r}: {path} shares its weight with {', '.join(tied[:3])} in the base. Only the copy "
            f"at {path} is trained, and it is no longer shared. LoRA's ensure_weight_tying=True trains one for all.",
            stacklevel=5,
        )
