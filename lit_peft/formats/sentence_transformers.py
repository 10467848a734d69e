"""What turns a folder of transformers into one that sentence-transformers opens: its modules and their settings."""

from __future__ import annotations

import json
from pathlib import Path

from lit_peft.formats.files import write_json
from lit_peft.util.errors import LitPeftError

# The names that all versions of sentence-transformers read.
_POOLING = {
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
    "cls": "pooling_mode_cls_token",
}


def write_modules(folder: Path, dimension: int, pooling: str = "mean", normalize: bool = True) -> None:
    """Write `modules.json` and the settings of the pooling, so that `SentenceTransformer(folder)` gives our embeddings.

    Args:
        folder: a folder with a model and its tokenizer.
        dimension: the size of the model's hidden states.
        pooling: as in training: `mean`, `last` or `cls`.
        normalize: as in training.

    Raises:
        LitPeftError: `pooling` is not known.
    """
    if pooling not in _POOLING:
        raise LitPeftError(f"pooling={pooling!r} is not known: use {', '.join(_POOLING)}.")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    for path, _ in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    modes = {name: mode == pooling for mode, name in _POOLING.items()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dimension, **modes})
    (folder / "modules.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
