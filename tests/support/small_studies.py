"""For tests of studies: a study that only counts, cells measured in this process, a training that waits for SIGTERM."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import ClassVar

from treepo.errors import TreePOError
from treepo.policies import Frontier
from treepo.policies.branching import LevelBudget
from treepo.run.config import Config
from treepo.studies.findings import Findings, Result
from treepo.studies.run import StudyFolder
from treepo.studies.study import Cell, Results, Study, Watch, of_cell


def measure_here(folder: StudyFolder) -> StudyFolder:
    """Measure all cells one after the other in this process, as their own processes would."""
    while missing := folder.missing():
        for cell in missing:
            config = of_cell(folder.config, cell)
            result = folder.study.measure(config, cell, folder.prepare(cell), Watch())
            folder.keep(cell, json.loads(json.dumps(result)))
    return folder


def run_of(*scores: float, tokens: int = 100) -> Result:
    """The result of a trained cell with these held-out accuracies, an evaluation after every step."""
    curve = [
        {
            "step": i,
            "tokens": i * tokens,
            "seconds": float(i),
            "pass_at_1": s,
            "greedy": s,
            "pass_at_k": s,
            "maj_at_k": s,
        }
        for i, s in enumerate(scores)
    ]
    return {"curve": curve, "tokens": curve[-1]["tokens"], "seconds": curve[-1]["seconds"]}


class CountingStudy(Study):
    """Counts to three. It has two stages, and the second depends on the results of the first.

    Seed 1 fails while the file `bad` exists.
    """

    title: ClassVar[str] = "Counting"
    question: ClassVar[str] = "How far?"
    bad: str = ""

    def cells(self, config: Config, done: Results) -> list[Cell]:
        first = [Cell("first", seed, stage="pilot") for seed in range(self.seeds)]
        if not all(cell in done for cell in first):
            return first
        lr = 10 * done[first[0]]["count"]
        return first + [Cell("second", seed, (f"trainer.lr={lr}",)) for seed in range(self.seeds)]

    def measure(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        with (folder / "begun").open("a") as file:
            file.write("x")
        if self.bad and Path(self.bad).exists() and cell.seed == 1:
            raise TreePOError("one is bad")
        for count in range(3):
            watch.progress(count / 3, "counting")
        return {"count": 3 + cell.seed, "lr": config.trainer.lr, "seed": config.seed}

    def findings(self, config: Config, done: Results) -> Findings:
        return Findings((), ())


class HeldBranching(LevelBudget):
    """`LevelBudget` in a training that is held up once, until its process has handled a SIGTERM.

    It is held up if the file `gate` exists when the part `after` of the training is done. It removes the file.
    """

    gate: str
    after: float

    def __call__(self, frontier: Frontier) -> list[int]:
        if frontier.progress >= self.after and Path(self.gate).exists():
            handler, asked = signal.getsignal(signal.SIGTERM), []
            signal.signal(signal.SIGTERM, lambda *given: (handler(*given), asked.append(True)))
            while not asked:
                time.sleep(0.01)
            signal.signal(signal.SIGTERM, handler)
            Path(self.gate).unlink()
        return super().__call__(frontier)
