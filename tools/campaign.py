"""Mutated files over all readers, each with the limits that SECURITY.md promises.

    python tools/campaign.py 100000
    python tools/campaign.py 1000 --kinds adapters,data --seed 3 --keep faults

The cases are those of `tools/fuzz.py`. They run in processes of their own, so that a crash or a hang in native code is
counted as well, and the campaign goes on behind it. Prints a line for each kind of file, and every different fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

# Before torch is imported: a forked process has none of its parent's threads, and would wait for them.
os.environ["OMP_NUM_THREADS"] = "1"
import fuzz

# The part of each kind of file. Cases with a data file or a configuration take ten times as long as others.
SHARES = {"adapters": 0.5, "checkpoints": 0.35, "data": 0.1, "configs": 0.03, "gguf": 0.02}
# A process that is silent for so long hangs in native code; the machine may be busy with other things.
SILENT_SECONDS = 60
CHUNK = 2000


class Report:
    """The figures of one kind of file.

    Attributes:
        tally: how many cases ended how: `read`, `refused`, or a fault.
        faults: a description of each different fault.
        seconds: the longest processor time of a case.
        memory: the largest growth of memory in a case, in bytes.
    """

    def __init__(self) -> None:
        self.tally: Counter[str] = Counter()
        self.faults: dict[str, str] = {}
        self.seconds, self.memory = 0.0, 0

    def add(self, case: dict[str, Any]) -> None:
        """Count a case."""
        self.tally[case["result"]] += 1
        self.seconds, self.memory = max(self.seconds, case["seconds"]), max(self.memory, case["memory"])
        if case["fault"]:
            place = case["fault"].split(" at ")[-1].split(" ")[0]
            self.faults.setdefault(
                f"{case['result']} {place}", f"case {case['number']} ({case['name']}): {case['fault']}"
            )

    def line(self, kind: str) -> str:
        """Return the figures as a row of a Markdown table."""
        good = ("read", "refused", "hang", "crash", "memory", "other")
        cells = [f"{self.tally.total():,}", *(f"{self.tally[name]:,}" for name in good)]
        return f"| {kind} | {' | '.join(cells)} | {self.seconds:.1f} s | {self.memory / 2**20:.0f} MB |"


HEADER = (
    "| files | cases | read | refused | hang | crash | too much memory | other fault | longest | most memory |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def run(kind: str, count: int, seed: int = 0, keep: Path | None = None, first: int = 0) -> Report:
    """Run `count` cases of one kind of file, from number `first` on."""
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "originals").mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            reader = fuzz.READERS[kind](root / "originals")
        number = first
        while number < first + count:
            number = _chunk(reader, kind, root, seed, number, min(first + count, number + CHUNK), keep, report)
    return report


def _chunk(
    reader: Any, kind: str, root: Path, seed: int, number: int, end: int, keep: Path | None, report: Report
) -> int:
    """Run cases in a forked process until it ends; return the number of the next case."""
    shutil.rmtree(root / "case", ignore_errors=True)  # of a case that was killed
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        status = 1
        try:
            with os.fdopen(write_end, "w") as pipe:
                for case in range(number, end):
                    _one(reader, kind, root, seed, case, keep, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    silent = False
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        rest = b""
        while not silent:
            ready, _, _ = select.select([pipe], [], [], SILENT_SECONDS)
            silent = not ready
            data = pipe.read(2**16) if ready else b""
            if ready and not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                report.add(json.loads(line))
                number += 1
    if silent:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if number < end:
        fault = "hangs in native code" if silent else f"the process ended with status {status}"
        result = "hang" if silent else "crash"
        report.add(dict(number=number, name=kind, result=result, fault=f"{fault} at {kind}", seconds=0, memory=0))
        number += 1
    return number


def _one(reader: Any, kind: str, root: Path, seed: int, number: int, keep: Path | None, pipe: IO[str]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident memory is counted from now
    before, start = fuzz.process_memory("VmRSS") or 0, time.process_time()
    name, result, fault = fuzz.one_case(reader, kind, root, seed, number, keep)
    seconds, memory = time.process_time() - start, (fuzz.process_memory("VmHWM") or 0) - before
    pipe.write(json.dumps(dict(number=number, name=name, result=result, fault=fault, seconds=seconds, memory=memory)))
    pipe.write("\n")
    pipe.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=100_000, help="number of cases of all kinds together")
    parser.add_argument("--kinds", default=",".join(SHARES), help="kinds of files, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the files of each fault")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    total = sum(SHARES[kind] for kind in kinds)
    faults = 0
    print(HEADER, flush=True)
    for kind in kinds:
        report = run(kind, round(options.count * SHARES[kind] / total), options.seed, options.keep, options.first)
        print(report.line(kind), flush=True)
        faults += len(report.faults)
        for text in report.faults.values():
            print(f"  {text}", file=sys.stderr, flush=True)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
