"""Random numbers that depend on a seed and on the position in a run, not on earlier draws."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def run_seed() -> int:
    """Return the seed that was given to `seed_everything`; this process's own if none was given."""
    return int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % 2**32)


def seed_all(*numbers: int) -> None:
    """Seed torch (all devices), NumPy and Python from non-negative integers, whose order matters."""
    torch_seed, numpy_seed, python_seed = (int(word) for word in np.random.SeedSequence(numbers).generate_state(3))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)
