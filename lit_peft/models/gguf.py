"""GGUF files, converted once to a transformers folder in the cache.

Nothing here imports torch or transformers before a file has to be converted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import time
from pathlib import Path

from lit_peft.models.cache import cache_error, cache_root
from lit_peft.models.folders import check_model_folder
from lit_peft.models.gguf_header import check_gguf_header
from lit_peft.util.disk import clear_left, files_below, whole_folder
from lit_peft.util.errors import LitPeftError, first_line

# Part of every cache key. Raise it when the conversion changes what it writes.
_FORMAT = 1
# Files up to this size are hashed completely, larger ones in sampled blocks: reading them through would take minutes.
_HASH_WHOLE = 512 * 2**20
_HASH_BLOCK = 4 * 2**20


def convert_gguf(file: Path, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Convert a GGUF file to a transformers folder in the cache, or find the earlier conversion.

    The weights are dequantized to float32, which holds every GGUF value exactly. The folder is put in place by one
    rename, so that it is either complete or absent, and two processes may convert at the same time.

    Args:
        file: the `.gguf` file.
        cache_dir: see `cache_root`.

    Returns:
        A folder with `config.json`, safetensors weights and the tokenizer with its chat template.

    Raises:
        LitPeftError: the file is not GGUF or has an unsupported architecture, `gguf` is not installed, or the cache
            cannot be written.
    """
    from filelock import FileLock

    try:
        with open(file, "rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise LitPeftError(f"base {str(file)!r} is not a GGUF file (it starts with {magic!r}); download it again.")
        check_gguf_header(file)
        target = cache_root(cache_dir) / "gguf" / f"{file.stem}-{_file_key(file)}"
        if (target / "config.json").is_file():
            return target
        if importlib.util.find_spec("gguf") is None:
            raise LitPeftError(f"base {str(file)!r} is a GGUF file; reading it needs `pip install gguf`.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            # Another process may have finished while this one waited for the lock.
            if not (target / "config.json").is_file():
                _convert(file, target)
    except OSError as exc:
        raise cache_error(f"base {str(file)!r}", exc) from exc
    return target


def _file_key(file: Path) -> str:
    """Hash name, size and content, so that a reinstalled file finds its conversion and a changed file does not."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{_FORMAT}\0{file.name}\0{size}".encode())
    with open(file, "rb") as stream:
        if size <= _HASH_WHOLE:
            while block := stream.read(_HASH_BLOCK):
                digest.update(block)
        else:
            digest.update(str(file.stat().st_mtime_ns).encode())
            for step in range(33):
                stream.seek((size - _HASH_BLOCK) * step // 32)
                digest.update(stream.read(_HASH_BLOCK))
    return digest.hexdigest()[:16]


def _convert(file: Path, target: Path) -> None:
    # This process has the lock, so a temporary folder of this target was left by a killed process.
    clear_left(target, 0)
    size = file.stat().st_size / 1e6
    print(f"lit-peft: converting {file.name} ({size:,.0f} MB) to safetensors, once …", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        with whole_folder(target) as temporary:
            _write_model(file, temporary)
            # safetensors makes its files readable by the owner only, which is wrong for a shared cache.
            for path in files_below(temporary):
                path.chmod(0o644)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    print(f"lit-peft: saved to {target} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)


def _write_model(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # Without `dequantize`, the model keeps its quantization config and save_pretrained refuses.
        model, report = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise LitPeftError(f"base {str(file)!r} has no weights for {', '.join(missing[:3])}; download it again.")
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    except (OSError, LitPeftError):
        raise
    except Exception as exc:
        # A damaged or unknown file makes the parser raise almost anything: ValueError, KeyError, struct.error, …
        raise LitPeftError(
            f"base {str(file)!r} could not be converted: {first_line(exc)}; the file is damaged, or transformers does "
            "not read this architecture from GGUF; use the model's safetensors folder."
        ) from exc
    check_model_folder(folder, str(file))
