"""The definition of a study: several arms, each measured with several seeds. An arm with a seed is a cell.

`treepo.studies.run` measures every cell in a process of its own and keeps each result, so a study that was stopped
can continue later. The same seed means the same starting model and the same problems in every arm. Differences between
arms are therefore taken seed by seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from treepo.rollouts import Actor
from treepo.run.build import build_actor
from treepo.run.config import Config, changed
from treepo.settings import Settings
from treepo.studies.findings import Arms, Findings, Result
from treepo.tasks import Problem
from treepo.tree import ScoredTree

START = "start"  # the stage in which the starting models are made
MAIN = "main"  # the stage whose cells are the arms


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: an arm with one seed."""

    arm: str
    seed: int
    overrides: tuple[str, ...] = ()  # what the arm changes in the configuration
    stage: str = MAIN

    @property
    def name(self) -> str:
        """The name of the cell, unique in its study. It can be used as a relative path."""
        return f"{self.stage}/{re.sub(r'[^a-zA-Z0-9.]+', '-', self.arm).strip('-')}/seed-{self.seed}"


Results = Mapping[Cell, Result]


class Stopped(Exception):  # noqa: N818  # not an error
    """A cell was asked to stop. It keeps nothing of its work."""


class Watch:
    """A cell reports its progress here, and finds out here whether it should stop. This class shows nothing."""

    def __init__(self) -> None:
        self.stopping = False
        self._on_stop: Callable[[], None] | None = None

    def progress(self, part: float, note: str = "") -> None:
        """Report that `part` of the cell is done, 0 to 1.

        Raises `Stopped` if the cell was asked to stop, unless the cell handles that itself (`on_stop`).
        """
        if self.stopping and self._on_stop is None:
            raise Stopped

    def on_stop(self, function: Callable[[], None]) -> None:
        """Call `function` when the cell is asked to stop. The cell then ends soon and keeps its work."""
        self._on_stop = function

    def stop(self) -> None:
        """Ask the cell to stop."""
        self.stopping = True
        if self._on_stop is not None:
            self._on_stop()


class Study(Settings):
    """The settings of a study, changed by `study.key=value`. Its methods say what is measured and what it shows."""

    title: ClassVar[str]
    question: ClassVar[str]

    seeds: int = Field(5, ge=1, description="Seeds per arm: 0, 1, ...")
    jobs: int = Field(
        1, ge=1, description="Cells measured at the same time. With more than one, measured seconds are unreliable."
    )

    def quick(self) -> Self:
        """A version that takes minutes. It shows how the study works; its numbers mean little."""
        return self.model_copy(update={"seeds": 2})

    def quick_config(self) -> Sequence[str]:
        """The changes that the quick version makes to the configuration."""
        return ()

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Name of each arm -> what it changes in the configuration. The first arm is the baseline."""
        raise NotImplementedError

    def stages(self, config: Config, done: Results) -> Iterator[list[Cell]]:
        """The cells of each stage. The next stage is asked for when all cells so far are in `done`.

        By default the first stage makes a starting model per seed. The second measures every arm with every seed.
        """
        yield starting_cells(config, range(self.seeds))
        yield self.main_cells(config, done)

    def main_cells(self, config: Config, done: Results) -> list[Cell]:
        """Every arm with every seed, from the starting model of the seed."""
        return [
            Cell(arm, seed, (*from_start(config, seed, done), *overrides))
            for seed in range(self.seeds)
            for arm, overrides in self.arms(config).items()
        ]

    def cells(self, config: Config, done: Results) -> list[Cell]:
        """All cells that are known so far: those of the finished stages and those of the next one."""
        found: list[Cell] = []
        for stage in self.stages(config, done):
            found += stage
            if not all(cell in done for cell in stage):
                break
        return found

    def measure(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        """Measure a cell. None: it was asked to stop, and can continue later in the same `folder`.

        `config` has the overrides of the cell and its seed.
        """
        if cell.stage == START:
            return starting_model(config, folder, watch)
        return self.measure_arm(config, cell, folder, watch)

    def measure_arm(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        """Measure a cell that makes no starting model; as `measure`."""
        raise NotImplementedError

    def findings(self, config: Config, done: Results) -> Findings:
        """What the results of all cells show."""
        raise NotImplementedError


def starting_cells(config: Config, seeds: Sequence[int]) -> list[Cell]:
    """A cell per seed that makes the model from which all arms start. No cells if the configuration names a model."""
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


def sample_trees(
    actor: Actor, config: Config, problems: Mapping[str, Problem], on_progress: Callable[[int, int], None]
) -> list[ScoredTree]:
    """A scored tree per problem, with the sampler and the seed of `config`.

    The key of a problem must be unique in the study: it decides the random numbers. `on_progress(trees done, of how
    many)` is called after every tree.
    """
    sampler = actor.sampler(config.sampler)
    return actor.sample(list(problems.items()), sampler, config.seed, on_progress=on_progress).trees


def of_cell(config: Config, cell: Cell) -> Config:
    """The configuration of a cell."""
    return changed(config, [*cell.overrides, f"seed={cell.seed}"])


def by_arm(done: Results, stage: str = MAIN) -> Arms:
    """The results of a stage: arm -> seed -> result. Arms are in the order of the cells."""
    found: Arms = {}
    for cell, result in done.items():
        if cell.stage == stage:
            found.setdefault(cell.arm, {})[cell.seed] = result
    return found
