"""The structure of the project holds: file and class sizes, the direction of imports, and private names of others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("lit_peft", "callbacks") for path in (ROOT / folder).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
FENCES = {
    "lit_peft/nn/torch_internals.py",
    "lit_peft/models/transformers_internals.py",
    "lit_peft/training/lightning_internals.py",
    "lit_peft/data/datasets_internals.py",
}
# A file imports only from its own layer and from those to the left.
LAYERS = (
    ("util",),
    ("nn",),
    ("models",),
    ("methods",),
    ("formats",),
    ("tasks",),
    ("data",),
    ("training",),
    ("callbacks",),
    ("commands", "cli", "serving", "modules"),
)
LOOSE = {"__init__", "__main__", "modules", "cli", "serving", "strategies", "checkpoint_io"}
# These re-export classes of `training` under documented paths.
ALIASES = {"strategies": "training", "checkpoint_io": "training"}
MAX_LINES, MAX_METHODS = 400, 25
_PRIVATE = re.compile(r"_[a-z]")
_INSPECTIONS = ("getsource", "getsourcelines", "getsourcefile", "__code__", "co_names", "f_back", "f_locals")
_BY_NAME = ("getattr", "setattr", "delattr", "hasattr")
# The standard library documents these two as public.
_DOCUMENTED = {"_exit", "_replace"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(node: ast.AST) -> str:
    return f"line {getattr(node, 'lineno', '?')}: {ast.unparse(node)[:90]}"


def is_fence(path: Path) -> bool:
    return path.stem.endswith("_internals")


def is_own_object(node: ast.expr) -> bool:
    """Whether an attribute is read from `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private attributes of objects that are not the file's own."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in reads if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    for node in reads:
        known = node.attr in own | _DOCUMENTED or node.attr.startswith("_lit_peft") or is_own_object(node.value)
        if _PRIVATE.match(node.attr) and not known:
            yield place(node)
    for node in ast.walk(tree):
        # The same by name: getattr(x, "_name").
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _BY_NAME
            and node.args[1:]
        ):
            found, name = node.args[:2]
            text = name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
            if _PRIVATE.match(text) and not (is_own_object(found) or text in own or text.startswith("_lit_peft")):
                yield place(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (place(node) for alias in node.names if _PRIVATE.match(alias.name))


def is_class_name(node: ast.AST) -> bool:
    """Whether an expression is `type(x).__name__`, `x.__class__.__name__` or the module's name of a class."""
    if not isinstance(node, ast.Attribute) or node.attr not in ("__name__", "__qualname__", "__module__"):
        return False
    kind = node.value
    called = isinstance(kind, ast.Call) and isinstance(kind.func, ast.Name) and kind.func.id == "type"
    return called or (isinstance(kind, ast.Attribute) and kind.attr == "__class__")


def inspections(tree: ast.Module) -> Iterator[str]:
    """Tests of class names, and looks at source and byte code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(map(is_class_name, (node.left, *node.comparators))):
            yield place(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_class_name(node.func.value):
            if node.func.attr in ("startswith", "endswith", "find", "partition", "lower"):
                yield place(node)
        elif isinstance(node, ast.Attribute) and node.attr in _INSPECTIONS:
            yield place(node)


def imports(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The modules of lit_peft that a file imports, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "lit_peft":
                yield from ((f"lit_peft.{alias.name}", node) for alias in node.names)
            else:
                yield node.module, node
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)


def layer_of(module: str) -> int | None:
    """The number of a module's layer; None outside of lit_peft, or for the package itself."""
    parts = module.split(".")
    if parts[0] != "lit_peft" or len(parts) < 2:
        return None
    name = ALIASES.get(parts[1], parts[1])
    return next((number for number, names in enumerate(LAYERS) if name in names), None)


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["lit_peft", *parts] if parts[0] == "callbacks" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_private_names_of_others_stay_behind_the_fences(path: Path) -> None:
    if not is_fence(path):
        assert not list(private_names(parsed(path)))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_class_is_told_by_its_name_and_no_source_is_read(path: Path) -> None:
    if not is_fence(path):
        assert not list(inspections(parsed(path)))


def test_there_is_one_fence_for_each_neighbour_and_a_contract_test_for_each() -> None:
    found = {name for path, name in zip(FILES, NAMES, strict=True) if is_fence(path)}
    assert found == FENCES
    for name in found:
        neighbour = Path(name).stem.removesuffix("_internals")
        assert (ROOT / "tests" / f"test_internals_{neighbour}.py").is_file(), name


def test_each_function_of_a_fence_is_used_and_tested() -> None:
    code = {path: path.read_text(encoding="utf-8") for path in FILES}
    for path in filter(is_fence, FILES):
        test = ROOT / "tests" / f"test_internals_{path.stem.removesuffix('_internals')}.py"
        tested = test.read_text(encoding="utf-8")
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                word = re.compile(rf"\b{node.name}\b")
                assert word.search(tested), f"{node.name} has no contract test"
                assert any(word.search(text) for other, text in code.items() if other != path), f"{node.name} is unused"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_classes_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            assert len(methods) <= MAX_METHODS, node.name


def test_only_a_few_files_stand_outside_the_folders() -> None:
    assert {path.stem for path in (ROOT / "lit_peft").glob("*.py")} <= LOOSE


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_to_lower_layers(path: Path) -> None:
    own = layer_of(module_of(path))
    if own is None:
        return
    upward = [
        place(node) for name, node in imports(parsed(path)) if (found := layer_of(name)) is not None and found > own
    ]
    assert not upward


def test_no_module_imports_itself_through_others() -> None:
    modules = {module_of(path): path for path in FILES}
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for target, node in imports(parsed(path)):
            named = {f"{target}.{alias.name}" for alias in getattr(node, "names", ())}
            # `from package import module` needs the module alone.
            found |= named & modules.keys() or {target} & modules.keys()
        # The package's own `__init__` imports lazily, by name.
        arrows[name] = found - {name, "lit_peft", "lit_peft.callbacks", "lit_peft.data"}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def test_the_scan_finds_what_it_forbids() -> None:
    tree = ast.parse(
        "x._data\nself._own\nsuper()._apply()\nother._own\ngetattr(x, '_hidden')\n"
        "type(x).__name__ == 'Linear'\ntype(x).__name__.endswith('Adam')\nf'{type(x).__name__}'\n"
        "inspect.getsource(f)\nf.__code__\nfrom x import _y\nos._exit(1)\n"
    )
    assert sorted(found.split(":")[0] for found in private_names(tree)) == ["line 1", "line 11", "line 5"]
    assert sorted(found.split(":")[0] for found in inspections(tree)) == ["line 10", "line 6", "line 7", "line 9"]
    assert layer_of("lit_peft.util.errors") == 0 and layer_of("torch.nn") is None
    assert layer_of("lit_peft.strategies") == layer_of("lit_peft.training")
