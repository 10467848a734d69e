"""Run the mutants that `mutmut run` has generated, several times faster: by forking after everything is imported.

    mutmut run                       # until its first mutant: it generates them, and notes which test calls what
    python -m pytest FILES --cov --cov-context=test      # which test runs which line: fewer tests for each mutant
    python tools/mutants.py          # all that have no result yet, in an order drawn at random
    python tools/mutants.py REGEX    # those whose name matches
    python tools/mutants.py REGEX 60 # and survivors once more, with all tests that are new since, for 60 seconds each

Run it from the project's folder. Results stand where mutmut keeps its own, so that `mutmut results` and `mutmut show`
know them. What runs while a module is imported runs before a mutant is switched on, and is not changed by it.
"""

from __future__ import annotations

import ast
import gc
import importlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from coverage import CoverageData

SURVIVED, KILLED, NO_TESTS, ENDLESS = 0, 1, 33, 36  # mutmut's numbers
SLOW = 8.0  # seconds above which a test is left out
FIRST = 10.0  # seconds of tests after which a mutant has survived a first run
PACKAGES = ("lit_peft", "torch", "transformers", "peft", "lightning", "datasets", "tokenizers", "torchmetrics", "numpy")


class Mutants:
    """pytest's loop over tests, replaced by one over mutants."""

    def __init__(self, root: Path, pattern: str, most: float | None) -> None:
        again, self.most = most is not None, most or FIRST
        self.root, self.again, self.failed = root, again, False
        noted = json.loads((root / "mutmut-stats.json").read_text())
        self.seconds: dict[str, float] = noted["duration_by_test"]
        self.callers: dict[str, list[str]] = noted["tests_by_mangled_function_name"]
        self.lines = Lines(root)
        self.files = {file: json.loads(file.read_text()) for file in sorted(root.glob("lit_peft/*/*.meta"))}
        self.todo = [
            (file, name)
            for file, content in self.files.items()
            for name, code in content["exit_code_by_key"].items()
            if re.search(pattern, name) and (code is None or (again and code != KILLED))
        ]
        random.Random(0).shuffle(self.todo)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        import lit_peft

        assert str(lit_peft.__file__).startswith(str(self.root)), "not the mutants' lit_peft"
        items = {item.nodeid: item for item in session.items if self.seconds.get(item.nodeid, 0) < SLOW}
        new = [name for name in items if name not in self.seconds] if self.again and self.lines.noted is None else []
        self.import_all(list(items.values()))
        counts: dict[int, int] = {}
        for number, (file, name) in enumerate(self.todo, 1):
            called = self.lines.tests(file, name)
            if called is None:
                called = set(self.callers.get(name.rpartition("__mutmut_")[0], ()))
            tests = self.order({*(called & items.keys()), *new})
            code = self.run(name, [items[test] for test in tests]) if tests else NO_TESTS
            self.files[file]["exit_code_by_key"][name] = code
            counts[code] = counts.get(code, 0) + 1
            if number % 25 == 0 or number == len(self.todo):
                for written, content in self.files.items():
                    written.write_text(json.dumps(content, indent=4))
                killed, survived = counts.get(KILLED, 0), counts.get(SURVIVED, 0)
                print(f"{number}/{len(self.todo)}: {killed} killed, {survived} survived, {counts}", flush=True)
        return True

    def order(self, tests: set[str]) -> list[str]:
        """New tests first; then one case of each test, the quickest first, then a second one of each, and so on."""
        cases: dict[str, int] = {}
        turns = {}
        for test in sorted(tests, key=lambda test: (self.seconds.get(test, -1.0), test)):
            function = test.partition("[")[0]
            turns[test] = cases[function] = cases.get(function, 0) + (test in self.seconds)
        return sorted(turns, key=lambda test: turns[test])

    def run(self, name: str, tests: list[pytest.Item]) -> int:
        """Run tests with a mutant in a child, until one fails; return mutmut's number for how that ended."""
        limit = time.monotonic() + 1.5 * self.most + 20
        child = os.fork()
        if not child:
            self.in_child(tests, name)
        while time.monotonic() < limit:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) and KILLED
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return ENDLESS

    def in_child(self, tests: list[pytest.Item], name: str = "", imported: Path | None = None) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.environ["MUTANT_UNDER_TEST"] = name
        code, end = KILLED, time.monotonic() + (math.inf if imported else self.most)
        try:
            for test, following in zip(tests, [*tests[1:], None], strict=True):
                test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
                if self.failed and imported is None:
                    break
                if time.monotonic() > end:
                    code = SURVIVED
                    break
            else:
                code = SURVIVED
            if imported is not None:
                imported.write_text("\n".join(sys.modules))
        finally:
            os._exit(code)

    def import_all(self, items: list[pytest.Item]) -> None:
        """Import here what a sample of the tests imports in a child: no child has to do it again."""
        quick = [item for item in items if self.seconds.get(item.nodeid, SLOW) < 1.5]
        imported = self.root / "imported.txt"
        child = os.fork()
        if not child:
            self.in_child(random.Random(0).sample(quick, min(150, len(quick))), imported=imported)
        os.waitpid(child, 0)
        for name in imported.read_text().split():
            if name.partition(".")[0] in PACKAGES and name not in sys.modules:
                importlib.import_module(name)
        gc.collect()
        gc.freeze()


class Lines:
    """Which tests run the statement that a mutant changes, from a run under coverage that noted them."""

    def __init__(self, root: Path) -> None:
        self.root, self.read = root, cache(self._read)
        self.noted: CoverageData | None = CoverageData(str(root.parent / ".coverage"))
        self.noted.read()
        if not self.noted.measured_contexts() - {""}:
            self.noted = None

    def tests(self, meta: Path, name: str) -> set[str] | None:
        """The tests' names; None where no run noted them."""
        if self.noted is None:
            return None
        file = meta.relative_to(self.root).with_suffix("")
        functions, mutated, contexts = self.read(str(file))
        name = name.rpartition(".")[2]
        plain = name.rpartition("__mutmut_")[0]
        function = functions[plain.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")]
        pairs = zip_longest(mutated[f"{plain}__mutmut_orig"][1:], mutated[name][1:])
        changed = next((at for at, (old, new) in enumerate(pairs, 1) if old != new), 0)
        lines = self.statement(function, function.lineno + changed)
        return {test.rpartition("|")[0] for line in lines for test in contexts.get(line, ()) if test}

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, list[str]], dict[int, list[str]]]:
        assert self.noted is not None
        original, mutant = self.root.parent / name, self.root / name
        text = mutant.read_text()
        lines = text.split("\n")
        mutated = {node.name: lines[node.lineno - 1 : node.end_lineno] for _, node in _functions(ast.parse(text))}
        functions = dict(_functions(ast.parse(original.read_text())))
        return functions, mutated, self.noted.contexts_by_lineno(str(original))

    def statement(self, function: Any, line: int) -> range:
        """The lines of the innermost statement at a line; of one with a body, those in front of the body."""
        here = function
        while True:
            inner = [node for node in ast.walk(here) if isinstance(node, ast.stmt) and node is not here]
            at = [node for node in inner if node.lineno <= line <= (node.end_lineno or 0)]
            if not at:
                break
            here = max(at, key=lambda node: (node.lineno, -(node.end_lineno or 0)))
        if here is function:
            return range(function.body[0].lineno, function.end_lineno + 1)
        body = getattr(here, "body", None)
        return range(here.lineno, max(here.lineno + 1, body[0].lineno) if body else here.end_lineno + 1)


def _functions(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                yield f"{node.name}.{inner.name}" if isinstance(node, ast.ClassDef) else inner.name, inner


def main(pattern: str = ".", most: str | None = None) -> Any:
    """Run the mutants whose name matches `pattern`; with `most`, seconds, those that were not killed once more."""
    import tomllib

    here, root = Path.cwd(), Path("mutants").resolve()
    os.chdir(root)
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() not in (here, here / "tests"))]
    os.environ["MUTANT_UNDER_TEST"] = ""
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]
    mutants = Mutants(root, pattern, None if most is None else float(most))
    print(f"{len(mutants.todo)} mutants", flush=True)
    # Threads that torch had started would be missing in the children.
    import torch

    torch.set_num_threads(1)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-m", "not heavy"]
    return pytest.main([*options, *settings["pytest_add_cli_args_test_selection"]], plugins=[mutants])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
