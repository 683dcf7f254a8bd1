"""Means over seeds with intervals, paired differences, and reading a learning curve between its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from treepo.forest import Floats

LEVEL = 0.95  # of every interval


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over `n` seeds and Student's t interval of 95 %; a single seed has no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of independent `values`, at least one."""
        mean, n = float(np.mean(values)), len(values)
        if n < 2:
            return cls(mean, None, None, n)
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean, mean - half, mean + half, n)

    @classmethod
    def of_ratios(cls, values: Sequence[float]) -> Mean:
        """The geometric mean of positive `values` with the interval of their logarithms."""
        logs = cls.of(np.log(values).tolist())
        low, high = (None if x is None else float(np.exp(x)) for x in (logs.low, logs.high))
        return cls(float(np.exp(logs.mean)), low, high, logs.n)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Mean | None:
    """The mean of `values` - `baseline` over the seeds that both have; None if there are none."""
    both = sorted(values.keys() & baseline.keys())
    return Mean.of([values[seed] - baseline[seed] for seed in both]) if both else None


def at(x: ArrayLike, y: ArrayLike, where: float) -> float:
    """The curve through the points (x, y), x ascending, at `where`; its ends go on level."""
    return float(np.interp(where, np.asarray(x, float), np.asarray(y, float)))


def first_reach(x: ArrayLike, y: ArrayLike, target: float) -> float | None:
    """The first x at which the curve through the points is at least `target`; None if it never is."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    (above,) = np.nonzero(ys >= target)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(xs[0])
    share = (target - ys[i - 1]) / (ys[i] - ys[i - 1])
    return float(xs[i - 1] + share * (xs[i] - xs[i - 1]))


def band(curves: Sequence[tuple[ArrayLike, ArrayLike]], points: int = 100) -> tuple[Floats, list[Mean]]:
    """The mean of several curves with intervals, at `points` places up to where the shortest of them ends."""
    end = min(float(np.asarray(x, float)[-1]) for x, _ in curves)
    start = max(float(np.asarray(x, float)[0]) for x, _ in curves)
    grid = np.linspace(start, end, points)
    return grid, [Mean.of([at(x, y, where) for x, y in curves]) for where in grid.tolist()]
