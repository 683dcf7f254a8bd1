"""Running a study: one process per cell, results that are kept, stopping and continuing, the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.small_runs import write_config
from tests.support.small_studies import CountingStudy, measure_here
from treepo.cli import app
from treepo.errors import ConfigError, TreePOError
from treepo.run.config import Config, changed, load
from treepo.studies import find
from treepo.studies.findings import Result
from treepo.studies.run import Runner, StudyFolder, StudyObserver
from treepo.studies.study import Cell, Stopped, Watch

ROOT = Path(__file__).parents[2]
FIRST = "study.first=[[2, 8]]"


class Events(StudyObserver):
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def planned(self, done: int, known: int) -> None:
        self.events.append(("planned", done, known))

    def progress(self, cell: Cell, part: float, note: str) -> None:
        self.events.append(("progress", cell.name, part))

    def finished(self, cell: Cell, result: Result) -> None:
        self.events.append(("finished", cell.name))


def test_later_stages_follow_from_earlier_ones_and_what_is_done_is_not_done_again(
    tmp_path: Path, config: Config
) -> None:
    out, bad, heard = tmp_path / "out", tmp_path / "bad", Events()

    def runner(seeds: int, jobs: int = 1) -> Runner:
        study = CountingStudy(seeds=seeds, jobs=jobs, bad=str(bad))
        return Runner(StudyFolder("counting", study, config, out), heard)

    one = runner(seeds=1)
    assert one()
    assert [(c.stage, c.seed, r["count"], r["lr"], r["seed"]) for c, r in one.folder.done.items()] == [
        ("pilot", 0, 3, 3e-3, 0),
        ("main", 0, 3, 30, 0),
    ]
    assert [e for e in heard.events if e[0] == "planned"] == [("planned", 0, 1), ("planned", 1, 2), ("planned", 2, 2)]
    assert ("progress", "pilot/first/seed-0", 2 / 3) in heard.events

    # A cell that fails ends the study with its name, and keeps the others.
    bad.touch()
    with pytest.raises(TreePOError, match="pilot/first/seed-1: one is bad"):
        runner(seeds=2)()
    assert (out / "cells" / "pilot" / "first" / "seed-0" / "result.json").is_file()
    assert not (out / "cells" / "pilot" / "first" / "seed-1" / "result.json").exists()

    bad.unlink()
    more = runner(seeds=2, jobs=2)
    assert more() and [r["lr"] for r in more.folder.done.values()] == [3e-3, 3e-3, 30, 30]
    begun = {path.parent.name: path.read_text() for path in (out / "cells" / "pilot" / "first").glob("*/begun")}
    assert begun == {"seed-0": "x", "seed-1": "xx"}


class Hasty(Runner):
    """Sends a signal to each process as soon as it is started, long before it has imported anything."""

    signal: int

    def _start(self, cell: Cell) -> None:
        super()._start(cell)
        for process, _ in self._running.values():
            os.kill(process.pid, self.signal)


class Stoppings(StudyObserver):
    def __init__(self) -> None:
        self.stopped_cells: list[Cell] = []

    def stopped(self, cell: Cell) -> None:
        self.stopped_cells.append(cell)


def test_a_cell_that_is_stopped_while_its_process_is_importing_is_a_stopped_cell(
    tmp_path: Path, config: Config
) -> None:
    heard = Stoppings()

    class Stopping(Hasty):
        signal = signal.SIGTERM

        def _start(self, cell: Cell) -> None:
            self.stopping = True
            super()._start(cell)

    runner = Stopping(StudyFolder("counting", CountingStudy(seeds=1), config, tmp_path / "out"), heard)
    assert runner() is False
    assert len(heard.stopped_cells) == 1 and not runner.folder.done


def test_a_cell_that_is_killed_without_being_told_to_stop_is_an_error(tmp_path: Path, config: Config) -> None:
    class Killing(Hasty):
        signal = signal.SIGTERM

    runner = Killing(StudyFolder("counting", CountingStudy(seeds=1), config, tmp_path / "out"))
    with pytest.raises(TreePOError, match="its process ended with status -15"):
        runner()


def test_ctrl_c_in_a_terminal_does_not_reach_a_process_that_is_importing(tmp_path: Path, config: Config) -> None:
    class Interrupting(Hasty):
        signal = signal.SIGINT

    runner = Interrupting(StudyFolder("counting", CountingStudy(seeds=1), config, tmp_path / "out"))
    assert runner() is True


def test_a_folder_belongs_to_one_study(tmp_path: Path, config: Config) -> None:
    out = tmp_path / "out"
    StudyFolder("counting", CountingStudy(seeds=1), config, out)
    StudyFolder("counting", CountingStudy(seeds=9, jobs=2), changed(config, ["out=elsewhere"]), out)
    with pytest.raises(ConfigError, match="holds a study with another settings"):
        StudyFolder("counting", CountingStudy(seeds=1, bad="x"), config, out)
    with pytest.raises(ConfigError, match="holds a study with another config"):
        StudyFolder("counting", CountingStudy(seeds=1), changed(config, ["trainer.lr=1"]), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no study"):
        StudyFolder("counting", CountingStudy(), config, tmp_path / "mine")


def test_a_watch_that_nobody_handles_ends_the_cell_and_one_that_is_handled_does_not() -> None:
    watch = Watch()
    watch.progress(0.5)
    watch.stop()
    with pytest.raises(Stopped):
        watch.progress(0.6)
    watch, called = Watch(), []
    watch.on_stop(lambda: called.append(1))
    watch.stop()
    watch.progress(0.6)
    assert called == [1] and watch.stopping


def test_a_study_that_is_interrupted_goes_on_where_it_was_and_ends_the_same(tmp_path: Path) -> None:
    """The same command runs twice, and Ctrl-C ends it in step 3 the first time. The twin runs here in one go."""
    config, parts, gate = write_config(tmp_path), tmp_path / "parts", tmp_path / "gate"
    held = {"kind": "tests.support.small_studies:HeldBranching", "gate": str(gate), "after": 0.3}
    changes = [
        f"sampler.branching={json.dumps(held)}",
        *("warmup.steps=20", "trainer.steps=6", "trainer.eval_every=3", "trainer.save_every=50"),
    ]
    command = ["study", "divergence", str(config), *changes, f"out={parts}", "study.seeds=1", FIRST]
    run = parts / "cells" / "main" / "first-2-to-8" / "seed-0" / "run"
    gate.touch()
    returned, said = interrupted(command, lambda: steps(run / "metrics.jsonl") == 2)
    assert returned == 130 and "the same command continues" in said
    assert steps(run / "metrics.jsonl") == 3, "the step that had begun is finished"
    assert not (parts / "results.json").exists() and list(run.glob("checkpoints/step-*"))

    result = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "How many children should the root" in result.output and "first 2 to 8" in result.output
    assert (parts / "report.html").is_file() and (parts / "plot.png").is_file()
    assert not (run / "checkpoints").exists(), "a finished run leaves its metrics only"

    study = find("divergence", ["seeds=1", FIRST.removeprefix("study.")])
    whole = measure_here(StudyFolder("divergence", study, load(config, changes), tmp_path / "whole"))
    cells = json.loads((parts / "results.json").read_text())["cells"]
    assert [cell["stage"] for cell in cells] == [cell.stage for cell in whole.done] == ["start", "main"]
    a, b = cells[1]["result"], list(whole.done.values())[1]
    for point in (*a["curve"], *b["curve"]):
        point.pop("seconds")
    for name in ("curve", "entropy", "reward", "tokens"):
        assert a[name] == b[name]


def steps(metrics: Path) -> int:
    """Training steps that a run has reported so far."""
    return metrics.read_text().count('"reward/mean"') if metrics.exists() else 0


def interrupted(command: list[str], ready: Callable[[], bool]) -> tuple[int, str]:
    """Run treepo in a process and press Ctrl-C once `ready`: its exit status and what it printed."""
    words = [sys.executable, "-c", "from treepo.cli import main; main()", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as running:
        try:
            while not ready():
                assert running.poll() is None
                time.sleep(0.02)
            running.send_signal(signal.SIGINT)
            said, _ = running.communicate()
        finally:
            running.kill()
    return running.returncode, said
