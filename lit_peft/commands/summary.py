"""The figures of a comparison: a summary of each method's runs, and the noise of a difference between two methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_peft.commands.plan import Plan
from lit_peft.commands.results import best_row

FULL, HEAD = "FullFineTuning", "HeadOnly"
# Two-sided 95 % quantiles of Student's t by degrees of freedom. For more degrees than are listed, the last one is used:
# it is slightly too large.
_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
_NORMAL = 1.96


@dataclass(frozen=True)
class Summary:
    """The runs of one method at its best learning rate.

    Attributes:
        values: the reported metric by seed.
        edge: whether the best learning rate is the lowest or the highest of three or more that were tried.
        curve: step, seconds of training and validation metric, averaged over the seeds.
        reached: seconds of training until the method reaches `Plan.reach` of full fine-tuning's validation metric; None
            if it never does, or if full fine-tuning was not run.
    """

    method: str
    metric: str
    mode: str
    learning_rate: float
    edge: bool
    values: dict[int, float]
    rows: int
    trainable: int
    total: int
    adapter_bytes: int
    peak_memory_bytes: int
    seconds_per_step: float
    curve: list[list[float]]
    reached: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float:
        """The standard deviation over the seeds; nan for a single seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    @property
    def share(self) -> float:
        """The trained parameters as a percentage of all parameters."""
        return 100 * self.trainable / self.total

    @property
    def is_accuracy(self) -> bool:
        """Whether the metric is a share of correct answers: the number of rows then gives its sampling error."""
        return self.metric.endswith("accuracy")


@dataclass(frozen=True)
class Difference:
    """The difference of two methods' metrics, and half the width of its 95 % interval; nan if that is unknown."""

    value: float
    noise: float

    @property
    def significant(self) -> bool:
        """Whether the difference is above noise; False if the noise is unknown."""
        return abs(self.value) > self.noise

    @property
    def within_noise(self) -> bool:
        """Whether the difference is within noise; False if the noise is unknown."""
        return abs(self.value) <= self.noise


def summarize(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """Return the summary of each method, the best first. Methods all of whose runs failed are left out."""
    found = []
    for method in plan.methods:
        own = [row for row in rows if row["method"] == method and "error" not in row]
        chosen = best_row([row for row in own if row["seed"] == 0])
        if chosen is None:
            continue
        rate = chosen["learning_rate"]
        tried = {row["learning_rate"] for row in own}
        runs = [row for row in own if row["learning_rate"] == rate]
        found.append(
            Summary(
                method=method,
                metric=("test_" if chosen["test"] is not None else "val_") + chosen["metric"],
                mode=chosen["mode"],
                learning_rate=rate,
                edge=len(tried) > 2 and rate in (min(tried), max(tried)),
                values={row["seed"]: row["validation" if row["test"] is None else "test"] for row in runs},
                rows=chosen["rows"],
                trainable=chosen["trainable"],
                total=chosen["total"],
                adapter_bytes=chosen["adapter_bytes"],
                peak_memory_bytes=max(row["peak_memory_bytes"] for row in runs),
                seconds_per_step=statistics.median(row["seconds_per_step"] for row in runs),
                curve=_mean_curve([row["curve"] for row in runs]),
            )
        )
    full = next((summary for summary in found if summary.method == FULL), None)
    if full is not None:
        goal = full.curve[-1][2]
        found = [replace(summary, reached=_time_to_reach(summary, goal, plan.reach)) for summary in found]
    return sorted(found, key=lambda summary: summary.mean, reverse=bool(found) and found[0].mode == "max")


def _mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """Average curves point by point, aligned at their ends: with a budget of time, the numbers of steps differ."""
    length = min(map(len, curves))
    points = zip(*(curve[-length:] for curve in curves), strict=True)
    return [[statistics.fmean(values) for values in zip(*point, strict=True)] for point in points]


def _time_to_reach(summary: Summary, goal: float, share: float) -> float | None:
    for _, seconds, value in summary.curve:
        if value >= share * goal if summary.mode == "max" else value <= goal / share:
            return seconds
    return None


def difference(one: Summary, other: Summary) -> Difference:
    """Compare two methods over the seeds that both have.

    The noise is the larger of two errors: the paired t interval over the seeds and, for an accuracy, the sampling error
    of the evaluated rows. The latter treats the rows as independent samples; they are the same rows for both methods,
    so it is too large rather than too small.
    """
    seeds = sorted(one.values.keys() & other.values.keys())
    paired = [one.values[seed] - other.values[seed] for seed in seeds]
    noise = []
    if len(paired) > 1:
        quantile = _T[min(len(paired) - 1, max(_T))]
        noise.append(quantile * statistics.stdev(paired) / math.sqrt(len(paired)))
    if one.is_accuracy:
        noise.append(_NORMAL * math.sqrt(sum(x.mean * (1 - x.mean) for x in (one, other)) / one.rows))
    return Difference(statistics.fmean(paired), max(noise, default=math.nan))
