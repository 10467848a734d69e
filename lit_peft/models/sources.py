"""Where a base model or a data file comes from: a hub id, a folder, a GGUF file, an installed package.

Nothing here imports torch or transformers before a GGUF file has to be converted, so that every path a user wrote can
be checked before anything slow starts.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lit_peft.models.cache import CACHE_VARIABLE, cache_error, cache_root
from lit_peft.models.folders import check_model_folder
from lit_peft.models.gguf import convert_gguf
from lit_peft.models.hub import cached_commit, hub_error
from lit_peft.models.packages import PACKAGE_PREFIX, find_packaged_model, resolve_packaged_file
from lit_peft.util.errors import LitPeftError

__all__ = [
    "CACHE_VARIABLE",
    "PACKAGE_PREFIX",
    "BaseSource",
    "cache_error",
    "cache_root",
    "cached_commit",
    "check_model_folder",
    "convert_gguf",
    "hub_error",
    "resolve_base",
    "resolve_packaged_file",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class BaseSource:
    """A base model that was found.

    Attributes:
        path: the argument for `from_pretrained`: a hub id or a folder.
        name: the name to print: the hub id, the folder's or file's name, or the `pkg:` form.
        is_local: whether `path` is a folder on this machine.
    """

    path: str
    name: str
    is_local: bool


def resolve_base(base: str, cache_dir: str | os.PathLike[str] | None = None) -> BaseSource:
    """Find a base model.

    Args:
        base: one of
            a hub id (`"roberta-base"`, `"org/name"`);
            a folder with `config.json` and weights;
            a `.gguf` file;
            `"pkg:DISTRIBUTION"` or `"pkg:DISTRIBUTION/path/inside"`: a model in an installed Python package, which is
            located but never imported.
        cache_dir: where converted GGUF files are kept; see `cache_root`.

    Returns:
        The source. A GGUF file is converted to a safetensors folder on its first use. A hub id is not looked up.

    Raises:
        LitPeftError: there is no usable model; the message says what to install, download or write.
    """
    base = str(base).strip() if base is not None else ""
    if not base:
        raise LitPeftError("base is empty; give a hub id, a model folder, a .gguf file or 'pkg:DISTRIBUTION'.")
    if base.startswith(PACKAGE_PREFIX):
        return _local_source(find_packaged_model(base), base, base, cache_dir)
    path = Path(base).expanduser()
    if path.exists():
        name = path.name if path.suffix == ".gguf" else str(base).rstrip("/\\")
        return _local_source(path, base, name, cache_dir)
    if _looks_like_path(base):
        raise LitPeftError(f"base {base!r} does not exist{_similar_name(path)}; check the path.")
    if not _HUB_ID.fullmatch(base) or ".." in base or "--" in base:
        raise LitPeftError(
            f"base {base!r} is neither an existing folder nor a hub id ('name' or 'organisation/name'); packaged "
            "models are written 'pkg:DISTRIBUTION'."
        )
    return BaseSource(path=base, name=base, is_local=False)


def _local_source(path: Path, base: str, name: str, cache_dir: str | os.PathLike[str] | None) -> BaseSource:
    if path.is_dir():
        check_model_folder(path, base)
        return BaseSource(path=str(path), name=name, is_local=True)
    if path.suffix.lower() == ".gguf":
        return BaseSource(path=str(convert_gguf(path, cache_dir)), name=name, is_local=True)
    raise LitPeftError(f"base {base!r} is a file, but only .gguf files are read; give the model's folder.")


def _looks_like_path(base: str) -> bool:
    return (
        base.startswith((".", "/", "~"))
        or base.endswith(("/", ".gguf"))
        or "\\" in base
        or base.count("/") > 1
        or os.path.isabs(base)
    )


def _similar_name(path: Path) -> str:
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=1)
        if near:
            return f" (there is {str(path.parent / near[0])!r})"
    return ""
