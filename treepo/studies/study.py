"""What a study is: arms side by side with several seeds, each pair a cell that is measured by itself.

Cells run in processes of their own, and their results are kept one by one (`treepo.studies.run`), so that a study that
was stopped goes on where it was. The same seed means the same starting model and the same problems in every arm:
differences are taken seed by seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from treepo.run.build import build_actor
from treepo.run.config import Config, changed
from treepo.settings import Settings
from treepo.studies.statistics import Mean

START = "start"  # the stage in which starting models are made

Result = dict[str, Any]
"""What a cell found, as JSON values."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: an arm with one seed."""

    arm: str
    seed: int
    overrides: tuple[str, ...] = ()  # what the arm changes in the configuration
    stage: str = "main"

    @property
    def name(self) -> str:
        """Unique in the study, and fit for a folder."""
        return f"{self.stage}/{re.sub(r'[^a-zA-Z0-9.]+', '-', self.arm).strip('-')}/seed-{self.seed}"


Results = Mapping[Cell, Result]


class Stopped(Exception):  # noqa: N818  # not an error
    """A cell was asked to stop, and keeps nothing of what it did."""


class Watch:
    """How a cell tells of its progress, and learns that it should stop. This one shows it to nobody."""

    def __init__(self) -> None:
        self.stopping = False
        self._on_stop: Callable[[], None] | None = None

    def progress(self, part: float, note: str = "") -> None:
        """`part` of the cell is done, 0 to 1. Raises `Stopped` if it should stop and has not said how (`on_stop`)."""
        if self.stopping and self._on_stop is None:
            raise Stopped

    def on_stop(self, function: Callable[[], None]) -> None:
        """Call `function` when the cell is asked to stop: it then ends soon, and keeps what it did."""
        self._on_stop = function

    def stop(self) -> None:
        self.stopping = True
        if self._on_stop is not None:
            self._on_stop()


Value = str | int | float | Mean | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of names and numbers; a `Mean` is shown with its interval, None as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve, with an interval at each point if there were several seeds."""

    label: str
    x: list[float]
    y: list[Mean]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of several lines."""

    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """What a study says."""

    tables: tuple[Table, ...]
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = field(default=())  # sentences that a reader of the tables needs


class Study(Settings):
    """Settings of a study, changed by `study.key=value`; its methods are the study."""

    title: ClassVar[str]
    question: ClassVar[str]

    seeds: int = Field(5, ge=1, description="Seeds per arm: 0, 1, ...")
    jobs: int = Field(1, ge=1, description="Cells measured at the same time; more than one makes seconds unreliable.")

    def quick(self) -> Self:
        """A version that takes minutes: it shows how the study works, and no more."""
        return self.model_copy(update={"seeds": 2})

    def quick_config(self) -> Sequence[str]:
        """What the quick version changes in the configuration."""
        return ()

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Name -> what it changes in the configuration; the first is the baseline."""
        raise NotImplementedError

    def cells(self, config: Config, done: Results) -> list[Cell]:
        """All cells that can be named so far; asked again when these are done, until there are no new ones.

        By default a starting model per seed, and then every arm with every seed.
        """
        first = starting_cells(config, range(self.seeds))
        if not all(cell in done for cell in first):
            return first
        return first + [
            Cell(arm, seed, (*from_start(config, seed, done), *overrides))
            for seed in range(self.seeds)
            for arm, overrides in self.arms(config).items()
        ]

    def measure(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        """Measure a cell, in a process of its own; None: it was asked to stop, and will go on in the same folder.

        `config` has the cell's overrides and its seed.
        """
        raise NotImplementedError

    def findings(self, config: Config, done: Results) -> Findings:
        """What all cells together say."""
        raise NotImplementedError


def starting_cells(config: Config, seeds: Sequence[int]) -> list[Cell]:
    """Cells that make the model that every arm of a seed starts from; none if the configuration names a model."""
    return [] if config.model.create is None else [Cell("model", seed, stage=START) for seed in seeds]


def starting_model(config: Config, folder: Path, watch: Watch) -> Result:
    """Create and warm up the model of `config` and its seed, and save it in `folder`."""
    with build_actor(
        config, on_warmup=lambda step, steps, loss: watch.progress(step / steps, f"warm-up, loss {loss:.3f}")
    ) as actor:
        actor.model.save_pretrained(folder / "model")
        actor.tokenizer.save_pretrained(folder / "model")
    return {"model": str((folder / "model").resolve())}


def from_start(config: Config, seed: int, done: Results) -> tuple[str, ...]:
    """The overrides with which a cell starts from the model of its seed."""
    if config.model.create is None:
        return ()
    (found,) = [result for cell, result in done.items() if (cell.stage, cell.seed) == (START, seed)]
    model = config.model.model_dump(mode="json") | {"path": found["model"], "create": None}
    return (f"model={json.dumps(model)}", "warmup=null")


def of_cell(config: Config, cell: Cell) -> Config:
    """The configuration of a cell."""
    return changed(config, [*cell.overrides, f"seed={cell.seed}"])


def by_arm(done: Results, stage: str = "main") -> dict[str, dict[int, Result]]:
    """The results of a stage: arm -> seed -> result, arms in the order of the cells."""
    found: dict[str, dict[int, Result]] = {}
    for cell, result in done.items():
        if cell.stage == stage:
            found.setdefault(cell.arm, {})[cell.seed] = result
    return found
