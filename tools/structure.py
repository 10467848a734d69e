"""Print the figures of the project's structure: packages, imports, sizes, and private names of other libraries.

    python tools/structure.py            # this checkout
    python tools/structure.py --names    # and every place where a foreign private name is used
    python tools/structure.py FOLDER     # another checkout, e.g. an older version made by `git worktree add`

The limits are in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# A package may import from those to its left; the last four are one layer.
LAYERS = ("util", "nn", "models", "methods", "formats", "tasks", "data", "training", "callbacks")
TOP = ("commands", "cli", "serving", "modules")
MOST_LINES, MOST_METHODS = 400, 25


@dataclass
class Structure:
    """The figures of a checkout.

    Args:
        root: its folder.
    """

    root: Path
    files: dict[str, ast.Module] = field(init=False)
    lines: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        paths = [*self.root.glob("lit_peft/**/*.py"), *self.root.glob("callbacks/**/*.py")]
        texts = {str(path.relative_to(self.root)): path.read_text(encoding="utf-8") for path in sorted(paths)}
        self.files = {name: ast.parse(text) for name, text in texts.items()}
        self.lines = {name: len(text.splitlines()) for name, text in texts.items()}

    @cached_property
    def packages(self) -> Counter[str]:
        """The number of files of each package; loose files are under `.`."""
        return Counter(_package(name) for name in self.files)

    @property
    def loose(self) -> list[str]:
        """Files in `lit_peft/` that belong to no package."""
        return [name for name in self.files if _package(name) == "." and not name.endswith("__init__.py")]

    @cached_property
    def arrows(self) -> Counter[tuple[str, str]]:
        """How often one package (or loose file) imports another."""
        found: Counter[tuple[str, str]] = Counter()
        for name, tree in self.files.items():
            source = _unit(name)
            found.update((source, target) for target in _imports(tree) if target != source)
        return found

    @property
    def upward(self) -> dict[tuple[str, str], int]:
        """Imports from a layer to one that is above it, or to a loose file."""
        order = {name: index for index, name in enumerate(LAYERS)}
        return {
            (source, target): count
            for (source, target), count in sorted(self.arrows.items())
            if source in order and order.get(target, len(order)) > order[source]
        }

    @cached_property
    def classes(self) -> list[tuple[str, int, int]]:
        """Name, number of methods and number of lines of every class, the largest first."""
        found = []
        for tree in self.files.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    methods = sum(isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body)
                    found.append((node.name, methods, (node.end_lineno or node.lineno) - node.lineno + 1))
        return sorted(found, key=lambda item: item[1:], reverse=True)

    @property
    def long_files(self) -> dict[str, int]:
        """Files over the limit of lines."""
        return {name: count for name, count in self.lines.items() if count > MOST_LINES}

    @cached_property
    def foreign_names(self) -> dict[str, list[str]]:
        """Private names of objects that a file does not define, by file. `*_internals.py` may use them."""
        found = {}
        for name, tree in self.files.items():
            if not name.endswith("_internals.py") and (names := sorted(_foreign(tree))):
                found[name] = names
        return found


def _package(name: str) -> str:
    parts = name.split("/")
    return parts[0] if parts[0] == "callbacks" else parts[1] if len(parts) > 2 else "."


def _unit(name: str) -> str:
    """The package of a file, or the name of a loose file."""
    package = _package(name)
    return Path(name).stem if package == "." else package


def _imports(tree: ast.Module) -> Iterator[str]:
    """The units of `lit_peft` that a file imports, at its top or inside functions."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == "lit_peft":
                modules = [f"lit_peft.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "lit_peft" and len(parts) > 1:
                yield parts[1]


def _foreign(tree: ast.Module) -> set[str]:
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_self = {node.attr for node in attributes if _is_self(node.value)}
    return {
        node.attr
        for node in attributes
        if re.match(r"_[a-z]", node.attr) and not node.attr.startswith("_lit_peft")
        if not _is_self(node.value) and node.attr not in own | of_self
    }


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--names", action="store_true", help="list the foreign private names of every file")
    options = parser.parse_args()
    found = Structure(options.folder)
    packages = ", ".join(f"{name} {count}" for name, count in found.packages.most_common() if name != ".")
    print(f"files: {len(found.files)}, lines: {sum(found.lines.values()):,}")
    print(f"packages: {len(found.packages) - 1} ({packages})")
    print(f"loose files: {len(found.loose)} ({', '.join(Path(name).stem for name in found.loose)})")
    print(f"imports between packages: {len(found.arrows)} arrows, {sum(found.arrows.values())} imports")
    upward = ", ".join(f"{source} -> {target} ({count})" for (source, target), count in found.upward.items())
    print(f"imports upward: {len(found.upward)}{f': {upward}' if upward else ''}")
    print("largest classes:", ", ".join(f"{name} {m} methods, {n} lines" for name, m, n in found.classes[:4]))
    long = ", ".join(f"{name} {count}" for name, count in found.long_files.items())
    print(f"files over {MOST_LINES} lines: {len(found.long_files)}{f' ({long})' if long else ''}")
    total = sum(map(len, found.foreign_names.values()))
    print(f"private names of other objects: {total} in {len(found.foreign_names)} files")
    if options.names:
        for name, names in found.foreign_names.items():
            print(f"  {name}: {', '.join(names)}")


if __name__ == "__main__":
    main()
