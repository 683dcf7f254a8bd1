"""The report of a study: tables for the terminal, a plot, JSON, and a page in one file."""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from treepo.report.bars import Bars
from treepo.report.machine import device, versions
from treepo.run.config import dump
from treepo.studies.findings import Findings, Plot, Result, ResultTable, Value
from treepo.studies.run import StudyFolder, StudyObserver
from treepo.studies.study import Cell

COLORS = ("#4c72b0", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd", "#8c564b", "#7f7f7f", "#dd8452")


class StudyProgress(Bars, StudyObserver):
    """Shows the progress of a study.

    A terminal gets one bar for the whole study and one for each cell being measured. Elsewhere a line is printed for
    every finished cell.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, TextColumn("{task.description}"), time=TimeElapsedColumn())
        self._done = self._known = 0
        self._all = self._bar.add_task("cells", total=None, note="")
        self._cells: dict[Cell, TaskID] = {}

    def planned(self, done: int, known: int) -> None:
        self._done, self._known = done, known
        self._bar.update(self._all, completed=done, total=known)

    def progress(self, cell: Cell, part: float, note: str) -> None:
        if cell not in self._cells:
            self._cells[cell] = self._bar.add_task(escape(cell.name), total=100, note="")
        self._bar.update(self._cells[cell], completed=round(100 * part), note=escape(note))

    def finished(self, cell: Cell, result: Result) -> None:
        self._end(cell)
        self._done += 1
        self._bar.update(self._all, completed=self._done)
        self.console.print(f"{self._done}/{self._known}  {escape(cell.name)}", highlight=False)

    def stopped(self, cell: Cell) -> None:
        self._end(cell)

    def _end(self, cell: Cell) -> None:
        if cell in self._cells:
            self._bar.remove_task(self._cells.pop(cell))


def terminal_table(table: ResultTable) -> Table:
    """The table as rich shows it on a terminal."""
    found = Table(title=escape(table.title))
    for i, column in enumerate(table.columns):
        found.add_column(escape(column), justify="right" if i else "left", no_wrap=not i)
    for row in table.rows:
        found.add_row(*(escape(text(value)) for value in row))
    return found


def text(value: Value) -> str:
    """A value as text: `0.941 ±0.012`, `1.31 [1.20, 1.43]` if the interval is not symmetric, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if value.low is None or value.high is None:
        return _number(value.mean)
    up, down = value.high - value.mean, value.mean - value.low
    if abs(up - down) <= 1e-9 * max(1.0, abs(value.mean)):
        return f"{_number(value.mean)} ±{_number(up)}"
    return f"{_number(value.mean)} [{_number(value.low)}, {_number(value.high)}]"


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 2 else f"{value:.3f}"


def write_report(folder: StudyFolder, findings: Findings) -> dict[str, Path]:
    """Write `results.json`, `plot.png` and `report.html` into the folder of the study. Returns their paths by name."""
    study, config, out = folder.study, folder.config, folder.path
    paths = {"page": out / "report.html", "plot": out / "plot.png", "results": out / "results.json"}
    value = {
        "study": folder.name,
        "settings": study.model_dump(mode="json"),
        "tables": [asdict(table) for table in findings.tables],
        "notes": list(findings.notes),
        "cells": [{"stage": c.stage, "arm": c.arm, "seed": c.seed, "result": r} for c, r in folder.done.items()],
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "device": device(),
    }
    paths["results"].write_text(json.dumps(value) + "\n", encoding="utf-8")
    draw(findings.plots, paths["plot"])
    environment = Environment(loader=PackageLoader("treepo", "report"), autoescape=select_autoescape())
    page = environment.get_template("study.html").render(
        title=study.title,
        question=study.question,
        seeds=study.seeds,
        about=inspect.getdoc(type(study)),
        tables=[(t.title, t.columns, [[text(value) for value in row] for row in t.rows]) for t in findings.tables],
        notes=findings.notes,
        plot=base64.b64encode(paths["plot"].read_bytes()).decode(),
        settings=study.model_dump(mode="json"),
        config=dump(config),
        machine=f"{device()}; " + ", ".join(f"{package} {version}" for package, version in versions().items()),
    )
    paths["page"].write_text(page, encoding="utf-8")
    return paths


def draw(plots: Sequence[Plot], path: Path) -> None:
    """Write the plots side by side as a PNG. Intervals are shown as bands."""
    columns = min(3, len(plots))
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis, plot in zip(axes, plots, strict=False):
        _draw(axis, plot)
    for axis in axes[len(plots) :]:
        axis.axis("off")
    handles: Mapping[str, Any] = {
        label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]


def _draw(axis: Axes, plot: Plot) -> None:
    for curve, color in zip(plot.curves, COLORS * 4, strict=False):
        marker = "o" if len(curve.x) < 20 else ""
        axis.plot(curve.x, [y.mean for y in curve.y], marker=marker, ms=3, lw=1.5, color=color, label=curve.label)
        known = [(x, y.low, y.high) for x, y in zip(curve.x, curve.y, strict=True) if y.low is not None]
        if known:
            axis.fill_between(*map(list, zip(*known, strict=True)), color=color, alpha=0.13, lw=0)  # type: ignore[arg-type]
    if plot.log_x:
        axis.set_xscale("log", base=2)
    axis.set(xlabel=plot.x, ylabel=plot.y)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
