"""The result of a study: tables, plots and notes. How they are shown is decided in `treepo.report.study`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treepo.studies.statistics import Mean

Result = dict[str, Any]
"""What one cell (an arm with a seed) measured, as JSON values."""

Arms = dict[str, dict[int, Result]]
"""Arm -> seed -> result. The first arm is the baseline."""

Value = str | int | float | Mean | None


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Rows of names and numbers. A `Mean` is shown with its interval, None as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a plot: means `y` at the places `x`, with an interval at each place if there are several seeds."""

    label: str
    x: list[float]
    y: list[Mean]


@dataclass(frozen=True, slots=True)
class Plot:
    """Several curves over the same axes. `x` and `y` are the labels of the axes."""

    x: str
    y: str
    curves: tuple[Curve, ...]
    log_x: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that a study reports."""

    tables: tuple[ResultTable, ...]
    plots: tuple[Plot, ...]
    notes: tuple[str, ...] = ()  # sentences that explain how to read the tables


def mean_rows(arms: Arms, columns: Sequence[Callable[[Result], float]]) -> list[list[Value]]:
    """A row per arm: its name, and the mean over seeds of what each function in `columns` reads from a result."""
    return [[arm, *(Mean.of([read(r) for r in runs.values()]) for read in columns)] for arm, runs in arms.items()]


def means_table(title: str, arms: Arms, columns: Mapping[str, str]) -> ResultTable:
    """A table with one row per arm. `columns`: the name of a column -> the key of the result whose mean it shows."""
    reads = [lambda r, key=key: r[key] for key in columns.values()]
    return ResultTable(title, ("arm", *columns), mean_rows(arms, reads))
