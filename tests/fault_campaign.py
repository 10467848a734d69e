"""Kills every command and fills its disk, again and again: `fault_campaign.py --kills 200 --full_disks 50`.

Each command runs once without disturbance. Then its process group gets `kill -9`, at a random moment or just before a
random change of a file, up to four times in a row, each time followed by the same command. Or it runs on a file system
that is too small for it, which is then enlarged. After each fault, every file under a final name must be readable. A
full disk must be reported in one sentence with exit code 1 or 2. In the end the command must have written what it
writes without a fault, bit for bit, and nothing else.

The seed fixes the commands, the events and the sizes of the disks; the moments of kills by time depend on the machine.
Disks need the right to mount: as root, or with user namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_files import FileEvents, make_inputs, read_everything, results_of
from hub_server import Hub

CHAIN = 4  # kills in a row before a command may end
LIMIT = 180  # seconds for one command
LEFTOVERS = (".tmp-", ".old", ".partial-", ".incomplete")


@dataclass(frozen=True)
class Scenario:
    """A command, and which of its files must be the same after a fault.

    Args:
        name: its name in the table.
        arguments: the command. `{inputs}` is the folder of what it reads.
        results: patterns of the files to compare.
        share: its share of the kills and disks, relative to the others.
        disks: whether it writes enough to be run on full disks.
    """

    name: str
    arguments: str
    results: tuple[str, ...]
    share: int = 4
    disks: bool = True


_RUN = ("runs/*/adapter/*.safetensors", "runs/*/metrics.csv", "runs/*/checkpoints/last.ckpt")
_TRAINED = "--config {inputs}/run/config.yaml --ckpt_path {inputs}/run/last.ckpt"
SCENARIOS = [
    *(
        Scenario(
            f"fit, {workers} workers, {'validation' if rows else 'no validation'}",
            f"fit --config {{inputs}}/fit.yaml --data.num_workers {workers} {rows}--ckpt_path last",
            _RUN,
        )
        for workers in (0, 2)
        for rows in ("--data.validation_fraction 0.2 ", "")
    ),
    Scenario("test", f"test {_TRAINED} --data.test {{inputs}}/others.csv --output tested.jsonl", ("tested.jsonl",)),
    Scenario(
        "predict", f"predict {_TRAINED} --data.predict {{inputs}}/reviews.csv --output said.jsonl", ("said.jsonl",)
    ),
    Scenario("merge", "merge --base {inputs}/base --adapter {inputs}/adapter --output merged", ("merged/*",)),
    Scenario(
        "export", "export --ckpt_path {inputs}/run/last.ckpt --output exported --base {inputs}/base", ("exported/*",)
    ),
    Scenario("pull", "pull me/adapter pulled", ("pulled/*",)),
    Scenario("compare", "compare --config {inputs}/compare.yaml", ("compared/results.jsonl",), share=1),
]


class Campaign:
    """Runs scenarios in rooms of their own below a folder.

    Args:
        folder: the folder.
        seed: the seed of every draw.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.inputs = folder / "inputs"
        self.inputs.mkdir(parents=True)
        self.problems: list[str] = []
        self.whole: dict[str, tuple[dict[str, Any], float, int, int]] = {}

    # ------------------------------------------------------------------------------------------ running a command

    def start(self, arguments: Sequence[str], room: Path, deadly: int | None = None) -> int:
        """Start a command in a process of its own group; it dies before its change of a file number `deadly`."""
        room.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child:
            return child
        try:
            os.setsid()
            os.chdir(room)
            os.environ["LIT_PEFT_CACHE"] = str(room / "cache")
            log = os.open(f"{room}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["lit-peft"]
            events = FileEvents(room, deadly)
            sys.addaudithook(events)
            code = main(list(arguments))
            Path(f"{room}.events").write_text(str(events.count))
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)

    def wait(self, child: int, seconds: float) -> int | None:
        """Return the exit code of a command; kill it and return None if it is running after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return None if code == -signal.SIGKILL else code
            time.sleep(0.003)
        end_group(child)
        return None

    def arguments(self, scenario: Scenario) -> list[str]:
        return scenario.arguments.format(inputs=self.inputs).split()

    def run_whole(self, scenario: Scenario) -> tuple[dict[str, Any], float, int, int]:
        """Run a scenario without a fault; return its results, seconds, changes of files, and bytes on the disk."""
        if scenario.name not in self.whole:
            room = self.folder / slug(scenario.name) / "whole"
            began = time.monotonic()
            code = self.wait(self.start(self.arguments(scenario), room), LIMIT)
            seconds = time.monotonic() - began
            assert code == 0, f"{scenario.name} failed: {Path(f'{room}.log').read_text()[-3000:]}"
            read_everything(room)
            # As a file system counts: in pages.
            size = sum(-(-file.stat().st_size // 4096) * 4096 for file in room.rglob("*") if file.is_file())
            found = results_of(room, scenario.results), seconds, int(Path(f"{room}.events").read_text()), size
            self.whole[scenario.name] = found
        return self.whole[scenario.name]

    # ----------------------------------------------------------------------------------------------------- faults

    def kill(self, scenario: Scenario, number: int, most: int) -> int:
        """Kill a scenario up to `most` times in a row, then let it end; return the number of kills."""
        _, seconds, events, _ = self.run_whole(scenario)
        room, kills = self.folder / slug(scenario.name) / f"killed{number}", 0
        for _ in range(most):
            by_event = self.draw.random() < 0.5
            event = self.draw.randint(1, max(events, 1)) if by_event else None
            moment = LIMIT if by_event else self.draw.uniform(0.02, seconds)
            if self.done(scenario, room):
                break
            where = f"kill {number}.{kills + 1} ({f'event {event}' if event else f'{moment:.2f} s'})"
            code = self.wait(self.start(self.arguments(scenario), room, event), moment)
            if code is not None:
                if code:
                    self.note(scenario, where, f"exit code {code}: {Path(f'{room}.log').read_text()[-400:]!r}")
                break
            kills += 1
            self.check(scenario, room, where)
        self.finish(scenario, room, f"kills {number}")
        return kills

    def fill_disk(self, scenario: Scenario, number: int) -> None:
        """Run a scenario on a disk that is too small, and again after it was enlarged."""
        size = self.run_whole(scenario)[3]
        room = self.folder / slug(scenario.name) / f"disk{number}"
        room.mkdir(parents=True)
        # Whole pages, because a file system in memory rounds its size up to them.
        kilobytes = 4 * self.draw.randint(2, max(2, int(0.9 * size / 4096)))
        mount(room, "size", kilobytes)
        try:
            where = f"disk {number} ({kilobytes} kB of {size // 1024})"
            code = self.wait(self.start(self.arguments(scenario), room), LIMIT)
            said = Path(f"{room}.log").read_text(errors="replace")
            sentences = re.findall(r"^lit-peft: error: .*", said, re.MULTILINE)
            if code not in (1, 2) or len(sentences) != 1 or "Traceback" in said:
                self.note(scenario, where, f"exit code {code}, {len(sentences)} sentences: {said[-400:]!r}")
            self.check(scenario, room, where)
            mount(room, "remount,size", 1 << 16)
            self.finish(scenario, room, where)
        finally:
            subprocess.run(["umount", "--lazy", str(room)], check=True)

    def done(self, scenario: Scenario, room: Path) -> bool:
        """Whether the folder of a command that wants a new one is there."""
        return all(re.fullmatch(r"\w+/\*", each) for each in scenario.results) and all(
            (room / each).parent.exists() for each in scenario.results
        )

    def finish(self, scenario: Scenario, room: Path, where: str) -> None:
        """Let a scenario end and compare its results."""
        if not self.done(scenario, room):
            code = self.wait(self.start(self.arguments(scenario), room), LIMIT)
            if code != 0:
                said = Path(f"{room}.log").read_text(errors="replace")
                return self.note(scenario, where, f"the command after it failed ({code}): {said[-400:]!r}")
        self.check(scenario, room, where)
        expected, found = self.run_whole(scenario)[0], results_of(room, scenario.results)
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                self.note(scenario, where, f"{name} is not what an undisturbed command writes")
        paths = [path for path in room.rglob("*") if path.suffix != ".lock"]
        left = [str(path.relative_to(room)) for path in paths if any(part in path.name for part in LEFTOVERS)]
        if left:
            self.note(scenario, where, f"left over: {', '.join(sorted(left)[:3])}")

    def check(self, scenario: Scenario, room: Path, where: str) -> None:
        try:
            read_everything(room)
        except Exception as problem:
            self.note(scenario, where, f"unreadable: {problem!r:.300}")

    def note(self, scenario: Scenario, where: str, problem: str) -> None:
        self.problems.append(f"{scenario.name}: {where}: {problem}")
        print(f"  PROBLEM {self.problems[-1]}", flush=True)

    # ---------------------------------------------------------------------------------------------------- serving

    def kill_server(self, number: int) -> None:
        """Kill a server while it answers; another one on the same port must answer as before."""
        room = self.folder / "serve" / str(number)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = ["serve", "--base", str(self.inputs / "base"), "--adapter", f"a={self.inputs / 'adapter'}"]
        arguments += ["--port", str(port), "--accelerator", "cpu", "--max_new_tokens", "8"]
        said, asking = [], []
        for kills in range(2):
            server = self.start(arguments, room)
            try:
                said.append(ask(port, LIMIT))
                if not kills:
                    # Requests are under way when it dies.
                    asking = [os.fork() or (ask_and_exit(port)) for _ in range(4)]
                    time.sleep(self.draw.uniform(0, 0.2))
            finally:
                end_group(server)
                while asking:
                    os.waitpid(asking.pop(), 0)
        if said[0] != said[1] or not said[0]:
            self.problems.append(f"serve: kill {number}: the new server answered {said[1]!r}, not {said[0]!r}")
        if list(room.iterdir()):
            self.problems.append(f"serve: kill {number}: left over: {os.listdir(room)}")


def ask(port: int, seconds: float) -> str:
    """Return what a server answers, once it is there; empty if it is not there in time."""
    body = json.dumps({"prompt": "the film was", "adapter": "a"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", body, headers={"Content-Type": "application/json"}
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
            return json.dumps(json.load(answer))
        time.sleep(0.2)
    return ""


def ask_and_exit(port: int) -> int:
    with contextlib.suppress(BaseException):
        ask(port, 1)
    os._exit(0)


def end_group(leader: int) -> None:
    """Send `kill -9` to a process and its group."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
            kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)


def mount(folder: Path, option: str, kilobytes: int) -> None:
    """Mount a file system of this size, or change the size of the one that is mounted."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{option}={kilobytes}k", "tmpfs", str(folder)], check=True)


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)


@contextlib.contextmanager
def hub_process(server: Hub) -> Iterator[None]:
    """Serve the repositories of a hub in a process of its own: this one forks, which goes badly with threads."""
    child = os.fork()
    if not child:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients are killed
        server.serve_forever()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def import_everything() -> Callable[[list[str]], int]:
    """Import once what every command needs; return the command line's `main`."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from tqdm import tqdm

    import lit_peft
    import lit_peft.commands.lightning_cli
    from lit_peft.cli import main

    torch.set_num_threads(1)
    # The lock of its progress bars is shared between processes, and one that is killed may hold it.
    tqdm.set_lock(threading.RLock())
    lit_peft.LoRA  # noqa: B018
    return main


def train(campaign: Campaign) -> None:
    """Train the run that `test`, `predict`, `merge`, `export` and `serve` read."""
    room = campaign.folder / "training"
    arguments = f"fit --config {campaign.inputs}/fit.yaml --data.validation_fraction 0.2".split()
    assert campaign.wait(campaign.start(arguments, room), LIMIT) == 0, Path(f"{room}.log").read_text()
    run = room / "runs" / "version_0"
    (campaign.inputs / "run").mkdir()
    shutil.copy(run / "config.yaml", campaign.inputs / "run")
    shutil.copy(run / "checkpoints" / "last.ckpt", campaign.inputs / "run")
    shutil.copytree(run / "adapter", campaign.inputs / "adapter")


def run_campaign(campaign: Campaign, kills: int, disks: int, servers: int, only: str) -> list[tuple[str, int, int]]:
    """Run the scenarios whose names contain `only`; return the number of kills and full disks of each."""
    scenarios = [scenario for scenario in SCENARIOS if only in scenario.name]
    counts = {scenario.name: [0, 0] for scenario in scenarios}
    shares = sum(scenario.share for scenario in scenarios)
    for scenario in scenarios:
        wanted, began, number = round(kills * scenario.share / shares), time.monotonic(), 0
        while counts[scenario.name][0] < wanted:
            number += 1
            counts[scenario.name][0] += campaign.kill(scenario, number, min(CHAIN, wanted - counts[scenario.name][0]))
        for number in range(round(disks * scenario.share / shares)):
            campaign.fill_disk(scenario, number)
            counts[scenario.name][1] += 1
        print(f"{scenario.name}: {counts[scenario.name]}, {time.monotonic() - began:.0f} s", flush=True)
    if only in "serve":
        for number in range(servers):
            campaign.kill_server(number)
        counts["serve"] = [servers, 0]
    return [(name, *found) for name, found in counts.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full_disks", type=int, default=50)
    parser.add_argument("--servers", type=int, default=6, help="how many of the kills are of `serve`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only scenarios whose names contain this")
    parser.add_argument("--folder", help="an empty folder to keep everything in; a temporary one when unset")
    options = parser.parse_args()
    if options.full_disks and os.getuid() and not os.environ.get("FAULT_CAMPAIGN_NAMESPACE"):
        os.environ["FAULT_CAMPAIGN_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as temporary, Hub() as server:
        os.environ.update(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", OMP_NUM_THREADS="1")
        main = import_everything()
        campaign = Campaign(Path(options.folder or temporary).resolve(), options.seed)
        make_inputs(campaign.inputs)
        train(campaign)
        files = (campaign.inputs / "adapter").iterdir()
        server.files["me/adapter"] = {file.name: file.read_bytes() for file in files}
        servers = min(options.servers, options.kills)
        with hub_process(server):
            table = run_campaign(campaign, options.kills - servers, options.full_disks, servers, options.only)
    print(f"\n{'command':<32}{'kills':>8}{'full disks':>12}{'problems':>10}")
    for name, kills, disks in table:
        problems = sum(problem.startswith(f"{name}: ") for problem in campaign.problems)
        print(f"{name:<32}{kills:>8}{disks:>12}{problems:>10}")
    print("\n".join(campaign.problems))
    sys.exit(bool(campaign.problems))
