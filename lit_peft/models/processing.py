"""Loading processors, which turn texts with images or sounds into a model's inputs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_peft.models.sources import hub_error, resolve_base
from lit_peft.models.tokenization import tokenizer_digest, with_padding
from lit_peft.util.errors import LitPeftError, causes, closest, first_line
from lit_peft.util.type_checks import brief

# The parts of a processor, besides its tokenizer.
_PARTS = ("image_processor", "feature_extractor", "video_processor")
# The files with their settings.
_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def load_processor(
    base: str,
    field: str = "data.base",
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
    settings_field: str = "data.processor_args",
) -> Any:
    """Load the processor of a base model: its tokenizer, with what reads images or sounds.

    Args:
        base: a model, in any form that `lit_peft.models.sources.resolve_base` accepts.
        field: the setting's name, for error messages.
        revision: branch, tag or commit of a hub model.
        settings: values to use instead of the saved ones, by the names of the processor's and its parts' attributes.
        settings_field: the name of the setting that gives them, for error messages.

    Returns:
        The processor. Its tokenizer has a padding token.

    Raises:
        LitPeftError: there is no processor, a package that it needs is missing, or it does not have a setting.
    """
    settings = dict(settings or {})
    processor = _load(base, field, revision, settings)
    for name, value in settings.items():
        parts = [processor, *(part for part in (getattr(processor, part, None) for part in _PARTS) if part is not None)]
        if any(getattr(part, name, None) == value for part in parts):
            continue
        # Some settings become others: `max_pixels` becomes a part of `size`.
        others = {other: given for other, given in settings.items() if other != name}
        if processor_digest(_load(base, field, revision, others)) == processor_digest(processor):
            known = {name for part in parts for name in vars(part) if not name.startswith("_")}
            raise LitPeftError(
                f"{settings_field} has {name!r}: {brief(value)}, which changes nothing in the "
                f"{type(processor).__name__} of {base!r}; the closest settings are {closest(name, sorted(known))}."
            )
    with_padding(processor.tokenizer, base, field)
    return processor


def _load(base: str, field: str, revision: str | None, settings: Mapping[str, Any]) -> Any:
    from transformers import AutoProcessor

    version = {} if revision is None else {"revision": revision}
    path = resolve_base(base).path
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False, **version, **settings)
    except Exception as problem:  # OSError, ValueError, ImportError or KeyError, depending on what is missing
        if (missing := _missing_package(problem)) is not None:
            raise LitPeftError(
                f"{field} {base!r}: its processor needs {missing}: "
                '`pip install "lit-peft[vision]"` for images, `pip install "lit-peft[speech]"` for sounds.'
            ) from problem
        raise hub_error(base, problem, field=field) from problem
    if getattr(processor, "tokenizer", None) is None:
        raise LitPeftError(
            f"{field} {base!r} has no processor, only a {type(processor).__name__}: name a model that takes more than "
            "text, with the preprocessor_config.json or processor_config.json that it was saved with."
        )
    return processor


def _missing_package(problem: Exception) -> str | None:
    """Return the package for want of which a processor could not be loaded, in words; None for another problem."""
    text = " ".join(f"{type(link).__name__} {link}" for link in causes(problem)).lower()
    # Without torchvision, there are no processors of videos, which those of many models contain.
    if find_spec("torchvision") is None and ("torchvision" in text or "video" in text):
        return "the package torchvision"
    return f"a package that is missing ({first_line(problem)})" if isinstance(problem, ImportError) else None


def processor_digest(processor: Any) -> str:
    """Hash what a processor's output depends on, for cache keys."""
    parts = [part.to_json_string() for name in _PARTS if (part := getattr(processor, name, None)) is not None]
    whole = [type(processor).__name__, str(getattr(processor, "chat_template", None)), *parts]
    return hashlib.sha256("\0".join([tokenizer_digest(processor.tokenizer), *whole]).encode()).hexdigest()


def copy_processor(base: str, folder: Path, revision: str | None = None) -> None:
    """Copy the settings of a base's processor into a folder, besides those of its tokenizer, if it has a processor."""
    source = resolve_base(base)
    for name in _FILES:
        if source.is_local:
            path = Path(source.path) / name
        else:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

            try:
                path = Path(hf_hub_download(source.path, name, revision=revision))
            except (EntryNotFoundError, LocalEntryNotFoundError):  # this model has none, or it is not in the cache
                continue
        if path.is_file():
            shutil.copyfile(path, folder / name)
