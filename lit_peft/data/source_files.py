"""Globs, folders, URLs and names of datasets to the files and splits that they stand for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_peft.data.files import LOADERS, is_file
from lit_peft.data.remote import filesystem, inner_name, is_url
from lit_peft.data.rows import Split
from lit_peft.models.sources import PACKAGE_PREFIX, hub_error
from lit_peft.util.errors import LitPeftError, first_line

HUB_PREFIX = "hub:"
# Words in the path of a file that say to which split it belongs.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_MOST_NAMED = 3


def names_files(value: str) -> bool:
    """Tell whether a setting names files, a folder or a dataset of its own rather than a split of `data.dataset`."""
    return value.startswith(HUB_PREFIX) or is_file(value) or _is_glob(value) or Path(value).expanduser().is_dir()


def files_of(value: str, split: Split) -> tuple[list[str], str]:
    """Return the files that a path, glob, folder or URL stands for.

    Args:
        value: what the setting says.
        split: the split; a folder whose files are named after splits gives only those of this one.

    Returns:
        The files in the order of their names, and a line that says which they are; "" for a single file.

    Raises:
        LitPeftError: there are none.
    """
    field = f"data.{split}"
    if value.startswith(PACKAGE_PREFIX):
        return [value], ""
    if is_url(value):
        return _files_of_url(value, split, field)
    path = Path(value).expanduser()
    if path.is_dir():
        found = [str(file) for file in sorted(path.rglob("*")) if file.is_file()]
        return _files_of_folder(value, found, str(path), split, field)
    if path.exists() or not _is_glob(value):
        return [value], ""
    return _matches(value, sorted(filter(os.path.isfile, glob.glob(str(path), recursive=True))), field)


def _files_of_url(url: str, split: Split, field: str) -> tuple[list[str], str]:
    # Web servers have no lists of files, and a question mark starts a query there.
    if url.startswith(("http://", "https://")):
        return [url], ""
    system, path = filesystem(url, field)
    try:
        if _is_glob(path):
            return _matches(url, [system.unstrip_protocol(name) for name in sorted(system.glob(path))], field)
        if system.isdir(path):
            found = [system.unstrip_protocol(name) for name in sorted(system.find(path))]
            return _files_of_folder(url, found, system.unstrip_protocol(path), split, field)
    except Exception as exc:  # every file system has errors of its own
        raise LitPeftError(f"{field} {url!r} could not be listed: {first_line(exc)}; check the access.") from exc
    return [url], ""


def _matches(value: str, found: list[str], field: str) -> tuple[list[str], str]:
    if not found:
        raise LitPeftError(f"{field} {value!r} matches no file; check the pattern (`**` matches folders at any depth).")
    return found, _list_files(f"{field}: {value!r}", found)


def _files_of_folder(value: str, found: list[str], root: str, split: Split, field: str) -> tuple[list[str], str]:
    inside = {file: file[len(root) :].lstrip("/" + os.sep) for file in found}
    visible = [file for file in found if not any(part.startswith((".", "_")) for part in Path(inside[file]).parts)]
    files = [file for file in visible if Path(inner_name(file)).suffix.lower() in LOADERS]
    others = [inside[file] for file in visible if file not in files]
    if not files:
        raise LitPeftError(f"{field} {value!r} is a folder without data files ({', '.join(LOADERS)}); give another.")
    splits = {file: _split_of(inside[file]) for file in files}
    kept = files
    if any(splits.values()):
        kept = [file for file in files if splits[file] == split]
        if not kept:
            present = ", ".join(sorted({name for name in splits.values() if name}))
            raise LitPeftError(
                f"{field} {value!r} is a folder with files of {present}, by their names, and none of {split}; name the "
                "files."
            )
    left = [inside[file] for file in files if file not in kept] + others
    note = _list_files(f"{field}: {value!r}", [inside[file] for file in kept])
    return kept, note + (f" Not read: {_brief_list(left)}." if left else "")


def _split_of(path: str) -> str:
    words = re.split(r"[^a-zA-Z]+", path.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")


def _list_files(start: str, names: list[str]) -> str:
    return f"{start} is {len(names):,} file{'s' if len(names) > 1 else ''}: {_brief_list(names)}."


def _brief_list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _is_glob(value: str) -> bool:
    return glob.has_magic(value)


def split_hub_name(value: str, field: str) -> tuple[str, str | None, str | None]:
    """Return the dataset, configuration and split of `hub:NAME`, `hub:NAME:CONFIG`, `hub:NAME:SPLIT` or all three.

    A single word after the name is a configuration if the dataset has one of that name, and else a split.

    Raises:
        LitPeftError: the form is another, or the dataset cannot be reached.
    """
    name, *words = value.removeprefix(HUB_PREFIX).split(":")
    if not name or len(words) > 2 or not all(words):
        raise LitPeftError(f"{field} {value!r} is not a dataset; write hub:OWNER/NAME, :CONFIGURATION and :SPLIT.")
    if len(words) == 2:
        return name, words[0], words[1]
    if not words:
        return name, None, None
    import datasets

    try:
        configs = datasets.get_dataset_config_names(name)
    except Exception as exc:  # datasets raises a dozen types
        raise hub_error(name, exc, field=field, dataset=True) from exc
    return (name, words[0], None) if words[0] in configs else (name, None, words[0])


def is_saved_dataset(path: str) -> bool:
    """Tell whether a path is a folder that `save_to_disk` of `datasets` wrote."""
    return any((Path(path).expanduser() / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_saved(path: str) -> dict[str, Any]:
    """Open a folder that `save_to_disk` wrote: its splits by name; "train" for a single table.

    Raises:
        LitPeftError: the folder cannot be read.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(Path(path).expanduser()))
    except Exception as exc:  # of datasets, pyarrow or json
        raise LitPeftError(f"{path!r} is not a dataset that can be read: {first_line(exc)}; save it again.") from exc
    return {"train": found} if isinstance(found, datasets.Dataset) else {str(name): t for name, t in found.items()}
