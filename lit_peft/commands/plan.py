"""What `lit-peft compare` runs: the plan, and the runs (cells) that it consists of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lit_peft.methods.registry import METHODS, settings_class
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

# Arguments of the module and of the Trainer that the comparison sets for each run.
_SET_FOR_MODEL = ("base", "task", "learning_rate")
_SET_FOR_TRAINER = (
    *("max_steps", "min_steps", "max_epochs", "min_epochs", "max_time", "fast_dev_run", "overfit_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "callbacks", "devices", "num_nodes"),
)


@dataclass(frozen=True)
class Plan:
    """A comparison, as its YAML file describes it.

    Args:
        base: the base model, as in `lit-peft fit`.
        task: the task.
        data: `class_path` and `init_args` of the data module.
        methods: the settings of each method by its name; `learning_rate` is the center of the search.
        model: settings shared by all methods, e.g. `lr_scheduler`.
        trainer: arguments of the Trainer, e.g. `precision`.
        steps: the budget: optimizer steps of every run.
        seconds: the budget as seconds of training instead; the first steps of a run tell how many steps fit.
        evaluations: validations during a run; the last one is at its end.
        seeds: runs of each method at its best learning rate, with seeds 0, 1, ...
        trials: learning rates to try for each method, with seed 0; validation chooses among them.
        spread: ratio of neighbouring learning rates.
        devices: number of runs at the same time, each on its own device. On a CPU they share its cores.
        reach: a share of full fine-tuning's validation metric; the report says how long each method takes to get there.
        output: folder of the results.
        data_hash: hash of the examples, which the command computes: runs on other data are other runs.

    Raises:
        LitPeftError: a value is out of range, or a method is unknown.
    """

    base: str
    task: str
    data: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in METHODS})
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: int = 200
    seconds: float | None = None
    evaluations: int = 4
    seeds: int = 3
    trials: int = 3
    spread: float = 3.0
    devices: int = 1
    reach: float = 0.95
    output: str = "lit_peft_runs/compare"
    data_hash: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluations", "seeds", "trials", "devices"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LitPeftError(f"{name}={value!r} must be an integer of at least 1.")
        if self.seconds is not None and not self.seconds > 0:
            raise LitPeftError(f"seconds={self.seconds} must be positive: give the training time of a run, e.g. 60.")
        if not self.spread > 1:
            raise LitPeftError(f"spread={self.spread} must be above 1: give the ratio of learning rates, e.g. 3.")
        if not 0 < self.reach <= 1:
            raise LitPeftError(f"reach={self.reach} must be above 0 and at most 1: give a share, e.g. 0.95.")
        for name in self.methods:
            if name not in METHODS:
                raise LitPeftError(f"methods has {name!r}, which is unknown: the closest are {closest(name, METHODS)}.")
        if not self.methods:
            raise LitPeftError("methods is empty: name at least one method, or leave the key out to compare all.")
        for part, given, names in (
            ("model", self.model, _SET_FOR_MODEL),
            ("trainer", self.trainer, _SET_FOR_TRAINER),
        ):
            for name in names:
                if name in given:
                    raise LitPeftError(f"{part} has {name!r}, which the comparison sets for each run: leave it out.")
        if "class_path" not in self.data:
            raise LitPeftError("data has no class_path: name a data module, e.g. class_path: TextClassificationData.")
        if not isinstance(self.data.get("init_args", {}), dict):
            raise LitPeftError(f"data.init_args={brief(self.data['init_args'])} must map names to values.")

    @property
    def total_cells(self) -> int:
        """The number of runs."""
        return len(self.methods) * (self.trials + self.seeds - 1)


@dataclass(frozen=True)
class Cell:
    """One run: a method, a learning rate and a seed, and everything else that determines its result."""

    method: str
    learning_rate: float
    seed: int
    base: str
    task: str
    data: dict[str, Any]
    model: dict[str, Any]
    trainer: dict[str, Any]
    steps: int
    evaluations: int
    seconds: float | None = None
    data_hash: str = ""

    @property
    def accumulated_batches(self) -> int:
        """The number of batches in an optimizer step."""
        return int(self.trainer.get("accumulate_grad_batches", 1))

    @property
    def key(self) -> str:
        """An identifier that two runs share if, and only if, all their values are equal."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if self.seconds is not None:
            del values["steps"]
        if not self.data_hash:  # as the runs of earlier versions were identified
            del values["data_hash"]
        text = json.dumps(values, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """The run as one line for people."""
        return f"{self.method}, learning rate {self.learning_rate:g}, seed {self.seed}"


def make_cell(plan: Plan, method: str, learning_rate: float, seed: int) -> Cell:
    """Return the run of a method with this learning rate and seed."""
    settings = {name: value for name, value in plan.methods[method].items() if name != "learning_rate"}
    return Cell(
        method=method,
        learning_rate=learning_rate,
        seed=seed,
        base=plan.base,
        task=plan.task,
        data=plan.data,
        model={**plan.model, **settings},
        trainer=plan.trainer,
        steps=plan.steps,
        evaluations=plan.evaluations,
        seconds=plan.seconds,
        data_hash=plan.data_hash,
    )


def search_cells(plan: Plan, method: str) -> list[Cell]:
    """Return the runs of the search: the center first, then alternately the next higher and lower learning rate."""
    center = float(plan.methods[method].get("learning_rate") or settings_class(method).learning_rate)
    powers = [(trial + 1) // 2 * (1 if trial % 2 else -1) for trial in range(plan.trials)]
    return [make_cell(plan, method, float(f"{center * plan.spread**power:.3g}"), 0) for power in powers]
