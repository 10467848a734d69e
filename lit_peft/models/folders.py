"""Local model folders: whether they are complete."""

from __future__ import annotations

import json
from pathlib import Path

from lit_peft.util.errors import LitPeftError, first_line

# The list of the weight files has about 100 bytes for each tensor.
_MAX_INDEX = 64 * 2**20


def check_model_folder(folder: Path, base: str | None = None) -> None:
    """Check that a folder holds a complete transformers model: `config.json` and every weight file.

    Args:
        folder: the folder.
        base: what the user wrote, for the message; the folder itself if None.

    Raises:
        LitPeftError: a file is missing; the message names it.
    """
    name = repr(base or str(folder))
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise LitPeftError(
                f"base {name} is an adapter, not a base model (it has adapter_config.json but no config.json); give "
                "the model it was trained on."
            )
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; to use its GGUF file, name it: {str(folder / ggufs[0])!r}" if ggufs else ""
        raise LitPeftError(f"base {name} has no config.json, so it is not a transformers model folder{hint}.")
    if not weight_files(folder):
        raise LitPeftError(
            f"base {name} has a config.json but no weights (*.safetensors or pytorch_model*.bin); download the "
            "weights, or give another folder."
        )
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("pytorch_model*.bin.index.json")):
        size = index.stat().st_size
        if size > _MAX_INDEX:
            raise LitPeftError(f"base {name}: {index.name} has {size:,} bytes, at most {_MAX_INDEX:,} are read.")
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as exc:
            problem = first_line(exc)
            raise LitPeftError(f"base {name}: {index.name} cannot be read ({problem}); download it again.") from exc
        if missing:
            raise LitPeftError(
                f"base {name} lacks {len(missing)} of {len(shards)} weight files ({missing[0]}, …); download the "
                "folder again."
            )


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's files of model weights, leaving out adapters."""
    found = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return [path for path in found if not path.name.startswith("adapter_")]
