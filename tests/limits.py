"""Run a function in a process of its own, and measure the time and the memory that it takes."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lit_peft import LitPeftError
from lit_peft.util.memory import process_memory

# What each file of a stranger may cost.
SECONDS = 2.0
MEMORY = 500 * 2**20


@dataclass(frozen=True)
class Cost:
    """How a call ended, and what it took.

    Attributes:
        result: `done`, `refused` (a LitPeftError), `memory` (more than it may have), `slow` (stopped), `crash` (a
            signal ended the process), or the name of another exception.
        message: the error's message, or what the function returned.
        seconds: processor time.
        memory: the growth of the largest resident memory, in bytes.
    """

    result: str
    message: str
    seconds: float
    memory: int


def cost_of(call: Callable[[], object], seconds: float = SECONDS, memory: int = MEMORY) -> Cost:
    """Call a function in a forked process with limits of processor time and memory.

    Args:
        call: the function; what it returns becomes the message.
        seconds: the process is stopped after one second more than this.
        memory: the process cannot have more address space than now plus twice this. What it does have is measured.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            found = _run(call, seconds, memory)
            with os.fdopen(write_end, "w") as pipe:
                json.dump(found, pipe)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return Cost(*json.loads(text))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    slow = number in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
    return Cost("slow" if slow else "crash", f"signal {number}", seconds + 1, 0)


def _run(call: Callable[[], object], seconds: float, memory: int) -> tuple[str, str, float, int]:
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident memory is counted from now
    before, start = process_memory("VmRSS") or 0, time.process_time()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, ((process_memory("VmSize") or 0) + 2 * memory, hard))
    limit = int(start + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.alarm(int(10 * seconds) + 10)  # a process that only waits
    result, message = "done", ""
    try:
        message = str(call())[:500]
    except LitPeftError as error:
        result, message = "refused", str(error)
    except MemoryError:
        result = "memory"
    except BaseException as error:
        result = type(error).__name__
        message = f"{str(error)[:300]} at {traceback.extract_tb(error.__traceback__)[-1]}"
    taken = time.process_time() - start
    return result, message, taken, max(0, (process_memory("VmHWM") or 0) - before)
