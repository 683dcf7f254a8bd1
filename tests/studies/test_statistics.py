"""Means and intervals of several seeds, curves between their points, the jackknife."""

from __future__ import annotations

import numpy as np
import pytest

from treepo.studies.statistics import Mean, at, band, first_reach, paired


def test_an_interval_is_students() -> None:
    # 2.776 is the 97.5 % quantile of Student's t with 4 degrees of freedom.
    found = Mean.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.n == 5
    assert found.high == pytest.approx(3 + 2.7764 * np.sqrt(2.5) / np.sqrt(5), abs=1e-3)
    assert found.low == pytest.approx(6 - found.high)
    assert Mean.of([2.0]) == Mean(2.0, None, None, 1)


def test_a_ratios_interval_is_that_of_its_logarithm() -> None:
    found = Mean.of_ratios([0.5, 2.0])
    logs = Mean.of([-np.log(2), np.log(2)])
    assert (found.mean, found.low, found.high) == pytest.approx((1, np.exp(logs.low), np.exp(logs.high)))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = [(m := Mean.of(rng.normal(3, 2, 5).tolist())).low <= 3 <= m.high for _ in range(2000)]
    assert 0.935 < np.mean(inside) < 0.965


def test_differences_are_taken_seed_by_seed() -> None:
    assert paired({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.5, 0: 0.5, 3: 0.0}) == Mean.of([0.5, 0.5])
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_curve_is_read_between_its_points() -> None:
    x, y = [0, 10, 30], [0.2, 0.6, 0.8]
    assert [at(x, y, w) for w in (-5, 0, 5, 20, 99)] == pytest.approx([0.2, 0.2, 0.4, 0.7, 0.8])
    assert first_reach(x, y, 0.7) == pytest.approx(20)
    assert first_reach(x, y, 0.1) == 0 and first_reach(x, y, 0.81) is None
    assert first_reach([0, 1, 2, 3], [0.0, 0.5, 0.3, 0.9], 0.4) == pytest.approx(0.8), "the first time, not the last"


def test_a_band_ends_where_the_shortest_curve_does() -> None:
    grid, means = band([([0, 4], [0, 4]), ([0, 8], [2, 2])], points=5)
    assert grid.tolist() == [0, 1, 2, 3, 4]
    assert [m.mean for m in means] == [1, 1.5, 2, 2.5, 3]


def test_the_jackknife_of_a_mean_is_students_interval_and_takes_the_bias_off_a_square() -> None:
    values = np.random.default_rng(0).normal(2, 3, (4000, 6))
    seeds = range(6)
    found, plain = Mean.jackknife(seeds, lambda some: float(values[0, list(some)].mean())), Mean.of(values[0].tolist())
    assert found and (found.mean, found.low, found.high) == pytest.approx((plain.mean, plain.low, plain.high))
    squares = [Mean.jackknife(seeds, lambda some, v=v: float(v[list(some)].mean() ** 2)).mean for v in values]
    assert np.mean(squares) == pytest.approx(4, abs=0.15), "the plain square is 4 + 9 / 6 on average"


def test_the_jackknife_needs_every_part() -> None:
    assert Mean.jackknife(range(3), lambda some: None if 1 not in some else 1.0) is None
    assert Mean.jackknife([4], lambda some: float(len(some))) == Mean(1.0, None, None, 1)
