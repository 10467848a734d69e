"""Random numbers that are a function of a seed and of where a run stands, not of what was drawn before."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def run_seed() -> int:
    """The seed that `seed_everything` was given; this process' own where nobody gave one."""
    return int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % 2**32)


def seed_all(*numbers: int) -> None:
    """Seed torch (all devices), NumPy and Python from some non-negative integers: their order counts."""
    torch_seed, numpy_seed, python_seed = (int(word) for word in np.random.SeedSequence(numbers).generate_state(3))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)
