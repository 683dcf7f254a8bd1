"""Means over seeds with intervals, paired differences, and values of a learning curve between its points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit  # scipy.stats has the same quantile, but every cell's process would import it

from treepo.forest import Floats

LEVEL = 0.95  # of every interval


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over `n` seeds with its 95 % interval (Student's t). A single seed has no interval: None."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of independent `values`, at least one."""
        mean, n = float(np.mean(values)), len(values)
        if n < 2:
            return cls(mean, None, None, n)
        half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean, mean - half, mean + half, n)

    @classmethod
    def of_ratios(cls, values: Sequence[float]) -> Mean:
        """The geometric mean of positive `values`. Its interval is computed from their logarithms."""
        return cls.of(np.log(values).tolist()).exp()

    @classmethod
    def jackknife(cls, seeds: Sequence[int], estimate: Callable[[Sequence[int]], float | None]) -> Mean | None:
        """The value of `estimate(seeds)`, corrected for bias, with an interval (Quenouille's jackknife).

        A non-linear function of a mean, such as its square, is biased. The jackknife leaves out one seed at a time and
        removes most of that bias. The interval treats its pseudo-values as independent. The result is None if
        `estimate` returns None for all seeds, or for all seeds but one.
        """
        n, whole = len(seeds), estimate(seeds)
        if whole is None or n < 2:
            return None if whole is None else cls(whole, None, None, n)
        without = [estimate([s for s in seeds if s != seed]) for seed in seeds]
        return cls.of([n * whole - (n - 1) * x for x in without if x is not None]) if None not in without else None

    def exp(self) -> Mean:
        """The exponential of a mean of logarithms, and of its interval."""
        low, high = (None if x is None else float(np.exp(x)) for x in (self.low, self.high))
        return Mean(float(np.exp(self.mean)), low, high, self.n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Mean | None:
    """The mean of `values` - `baseline` over the seeds that both have. None if they have no seed in common."""
    both = sorted(values.keys() & baseline.keys())
    return Mean.of([values[seed] - baseline[seed] for seed in both]) if both else None


def at(x: ArrayLike, y: ArrayLike, where: float) -> float:
    """The value at `where` of the curve through the points (x, y), x ascending. Outside it keeps its end values."""
    return float(np.interp(where, np.asarray(x, float), np.asarray(y, float)))


def first_reach(x: ArrayLike, y: ArrayLike, target: float) -> float | None:
    """The first x at which the curve through the points is at least `target`. None if it never is."""
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
    """The mean of several curves, with intervals, at `points` places. It ends where the shortest curve ends."""
    end = min(float(np.asarray(x, float)[-1]) for x, _ in curves)
    start = max(float(np.asarray(x, float)[0]) for x, _ in curves)
    grid = np.linspace(start, end, points)
    return grid, [Mean.of([at(x, y, where) for x, y in curves]) for where in grid.tolist()]
