"""Kills a run of `lit-peft fit` again and again, and goes on: `kill_run.py moves|times FOLDER KILLS SEED CONFIG`.

Trains CONFIG once without disturbance in FOLDER/whole, and in FOLDER/killed with KILLS times `kill -9` of one run, at
random moments or where it puts what it saved in its place, each followed by the same command. While it runs, and after
each kill, everything a reader can see must be whole, and nothing that was saved may be gone. Prints the number of steps
at each kill.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

import lit_peft
import lit_peft.commands.lightning_cli
from lit_peft.cli import main

# What every start needs is loaded once.
lit_peft.LoRA  # noqa: B018
with contextlib.suppress(ImportError):
    import peft  # noqa: F401
    import torchao  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401


def start(config: str, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Start the command in a process of its own, in that folder; `prepare` is called in it first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").touch()
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["lit-peft"]
        prepare()
        code = main(["fit", "--config", config, "--ckpt_path", "last"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def done(child: int) -> bool:
    """Whether the process has ended, well; a failed one is an error."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and status:
        raise SystemExit(f"the run failed: {os.waitstatus_to_exitcode(status)}")
    return bool(pid)


def saved_steps(folder: Path) -> int:
    """Read everything that can be seen; return the step of the newest training checkpoint."""
    for adapter in (*folder.glob("runs/version_*/adapters/[!.]*"), *folder.glob("steps/[!.]*")):
        try:
            tensors = load((adapter / "adapter_model.safetensors").read_bytes())
            note = json.loads((adapter / "adapter_checkpoint.json").read_text())
            config = json.loads((adapter / "adapter_config.json").read_text())
        except FileNotFoundError:
            # Replaced by a better one while it was being read.
            assert adapter.name == "last" or not adapter.exists(), f"{adapter} is half there"
            continue
        assert tensors and note["step"] > 0 and config
    steps = 0
    for file in folder.glob("runs/version_*/checkpoints/[!.]*.ckpt"):
        try:
            checkpoint = torch.load(file, weights_only=True)
        except FileNotFoundError:
            continue
        assert checkpoint["state_dict"]
        if file.stem.startswith("last"):
            steps = max(steps, checkpoint["global_step"])
    return steps


def listed_folders(folder: Path) -> None:
    """What the newest training checkpoint calls the best adapters is there."""
    for file in folder.glob("runs/version_*/checkpoints/last.ckpt"):
        states = torch.load(file, weights_only=True)["callbacks"]
        for key, state in states.items():
            if key.startswith("AdapterCheckpoint"):
                assert all((Path(path) / "adapter_config.json").is_file() for path in state["best_k_models"]), key


def die_at(move: int, before: bool) -> None:
    """Kill this process at its `move`-th renaming of a file or folder: where everything that is saved appears."""
    moves = itertools.count(1)

    def deadly(rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(*paths: Any, **options: Any) -> None:
            last = next(moves) == move
            if last and before:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*paths, **options)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        return renamed

    os.rename, os.replace = deadly(os.rename), deadly(os.replace)


def check_after_a_kill(folder: Path, known: int, number: int) -> int:
    now = saved_steps(folder)
    listed_folders(folder)
    assert now >= known, f"step {known} was saved, and {now} is there"
    print(f"kill {number}: {now} steps are saved", flush=True)
    return now


def kill_at_moves(folder: Path, kills: int, seed: int, config: str) -> None:
    """The process kills itself just before or after it puts something in place: the same on every machine."""
    assert os.waitpid(start(config, folder / "whole"), 0)[1] == 0, "the run failed"
    draw, known = random.Random(seed), 0
    for number in range(1, kills + 1):
        point = draw.randint(1, 16), draw.random() < 0.5
        _, status = os.waitpid(start(config, folder / "killed", lambda point=point: die_at(*point)), 0)
        if status != signal.SIGKILL:
            raise SystemExit(f"the run ended with {status} after {number - 1} kills: give it more steps")
        known = check_after_a_kill(folder / "killed", known, number)
    assert os.waitpid(start(config, folder / "killed"), 0)[1] == 0, "the run failed"


def kill_at_times(folder: Path, kills: int, seed: int, config: str) -> None:
    began = time.monotonic()
    child, startup = start(config, folder / "whole"), 0.0
    while not done(child):
        if not startup and "results:" in (folder / "whole/log.txt").read_text(errors="ignore"):
            startup = time.monotonic() - began
        time.sleep(0.01)
    training = time.monotonic() - began - startup
    draw, killed, known = random.Random(seed), 0, 0
    while True:
        began, log = time.monotonic(), folder / "killed/log.txt"
        starts = log.read_text(errors="ignore").count("results:") if log.exists() else 0
        child = start(config, folder / "killed")
        # Some are killed before the first step, most after it.
        early = draw.random() < 0.2
        end = began + draw.uniform(0, startup) if early else math.inf
        while time.monotonic() < end or killed == kills:
            if end == math.inf and log.read_text(errors="ignore").count("results:") > starts:
                end = time.monotonic() + draw.uniform(0, 1.2 * training / (kills + 1))
            if done(child):
                if killed < kills:
                    raise SystemExit(f"the run was over after {killed} kills: give it more steps")
                return
            saved_steps(folder / "killed")
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        known = check_after_a_kill(folder / "killed", known, killed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill = {"moves": kill_at_moves, "times": kill_at_times}[sys.argv[1]]
    kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
