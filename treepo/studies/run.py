"""Runs the cells of a study, each in a process of its own, and keeps every result as soon as it is measured."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from treepo import __version__
from treepo.errors import ConfigError, TreePOError
from treepo.files import whole_file, writing
from treepo.run.config import Config
from treepo.studies.findings import Result
from treepo.studies.study import Cell, Stopped, Study, Watch, of_cell

AGAIN = "fix that, and the same command continues"
MAY_CHANGE = {"seeds", "jobs"}  # settings of a study that may differ when it continues


class StudyObserver:
    """Its methods are called while a study runs. Here they do nothing; the command line shows progress bars."""

    def planned(self, done: int, known: int) -> None:
        """`done` cells are measured, of `known` cells. Later stages may add more."""

    def progress(self, cell: Cell, part: float, note: str) -> None:
        """`part` of a cell is done, 0 to 1."""

    def finished(self, cell: Cell, result: Result) -> None:
        """A cell is measured, and its result is on disk."""

    def stopped(self, cell: Cell) -> None:
        """A cell was asked to stop, and has stopped."""


class StudyFolder:
    """A study with its configuration and its folder, which keeps one result per cell.

    Raises `ConfigError` if the folder holds something else. `done`: the results so far.
    """

    def __init__(self, name: str, study: Study, config: Config, path: Path) -> None:
        self.name, self.study, self.config, self.path = name, study, config, path
        self.done: dict[Cell, Result] = {}
        self._claim()

    def missing(self) -> list[Cell]:
        """The cells that are known by now and have no result, here or on disk."""
        cells = self.study.cells(self.config, self.done)
        if len({cell.name for cell in cells}) < len(cells):
            raise ValueError("two cells have one name")
        for cell in cells:
            if cell not in self.done and (found := self._kept(cell)) is not None:
                self.done[cell] = found
        self.done = {cell: self.done[cell] for cell in cells if cell in self.done}
        missing = [cell for cell in cells if cell not in self.done]
        # The results just read from disk may complete a stage. Then the next stage is known.
        if not missing and len(self.study.cells(self.config, self.done)) > len(cells):
            return self.missing()
        return missing

    def prepare(self, cell: Cell) -> Path:
        """The folder in which a cell is measured; it exists afterwards."""
        folder = self._result(cell).parent
        with writing(folder, AGAIN):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def keep(self, cell: Cell, result: Result) -> None:
        """Add the result of a cell to `done`, and write it to disk."""
        path = self._result(cell)
        with writing(path, AGAIN), whole_file(path) as part:
            part.write_text(json.dumps({"cell": _json(cell), "result": result}) + "\n", encoding="utf-8")
        self.done[cell] = result

    def _kept(self, cell: Cell) -> Result | None:
        path = self._result(cell)
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["cell"] != _json(cell):
            raise ConfigError(f"{path}: belongs to another version of this study: start a new one (out=...)")
        result: Result = kept["result"]
        return result

    def _result(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.name / "result.json"

    def _claim(self) -> None:
        """Write which study this is. Raises `ConfigError` if the folder holds another one."""
        path = self.path / "study.json"
        settings = self.study.model_dump(mode="json", exclude=MAY_CHANGE)
        ours = {
            "study": self.name,
            "settings": settings,
            "config": self.config.model_dump(mode="json", exclude={"out"}),
        }
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            kept.pop("treepo")
            if kept != ours:
                changed = [key for key in ours if kept.get(key) != ours[key]]
                raise ConfigError(
                    f"out: {self.path} holds a study with another {' and '.join(changed)}: use the same as before, or "
                    "another folder (out=...)"
                )
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"out: {self.path} is in use and holds no study: choose another folder (out=...)")
        with writing(path, AGAIN):
            self.path.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"treepo": __version__, **ours}, indent=1) + "\n", encoding="utf-8")


class Runner:
    """Measures the missing cells of a study. A study that was stopped continues from its folder."""

    def __init__(self, folder: StudyFolder, observer: StudyObserver | None = None) -> None:
        if folder.config.engine.kind == "server" and folder.study.jobs > 1:
            raise ConfigError(
                "study.jobs: cells side by side would send their weights to the same servers: set study.jobs=1, or "
                "engine.kind=local"
            )
        self.folder = folder
        self.observer = observer or StudyObserver()
        self.stopping = False
        self._running: dict[Connection, tuple[SpawnProcess, Cell]] = {}

    def __call__(self) -> bool:
        """Measure the missing cells. True if all are done, False if the study was stopped before."""
        try:
            while waiting := self._plan():
                while (waiting or self._running) and not (self.stopping and not self._running):
                    while waiting and len(self._running) < self.folder.study.jobs and not self.stopping:
                        self._start(waiting.pop(0))
                    for connection in wait(list(self._running)):
                        self._receive(connection)  # type: ignore[arg-type]
                if self.stopping:
                    return False
        except KeyboardInterrupt:
            for process, _ in self._running.values():
                process.kill()
            raise
        finally:
            self.stop()
            for process, _ in self._running.values():
                process.join()
        return True

    def stop(self) -> None:
        """Ask the running cells to end soon, in a state from which they can continue."""
        self.stopping = True
        for process, _ in self._running.values():
            process.terminate()

    def _plan(self) -> list[Cell]:
        missing = self.folder.missing()
        done = len(self.folder.done)
        self.observer.planned(done, done + len(missing))
        return missing

    def _start(self, cell: Cell) -> None:
        study, config, folder = self.folder.study, of_cell(self.folder.config, cell), self.folder.prepare(cell)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(theirs, study, config, cell, folder))
        with _ctrl_c_ignored():
            process.start()
        theirs.close()
        self._running[ours] = process, cell

    def _receive(self, connection: Connection) -> None:
        process, cell = self._running[connection]
        try:
            kind, content = connection.recv()
        except EOFError:
            process.join()
            del self._running[connection]
            if self.stopping and process.exitcode == -signal.SIGTERM:  # it was still importing when it was told to stop
                self.observer.stopped(cell)
                return
            raise TreePOError(
                f"{cell.name}: its process ended with status {process.exitcode} (its output is above); the same "
                "command continues with the missing cells"
            ) from None
        if kind == "progress":
            self.observer.progress(cell, *content)
            return
        process.join()
        del self._running[connection]
        if kind == "failed":
            raise TreePOError(f"{cell.name}: {content}")
        if content is None:
            self.observer.stopped(cell)
            return
        self.folder.keep(cell, content)
        self.observer.finished(cell, content)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C from its beginning, also while it is still importing."""
    if threading.current_thread() is not threading.main_thread():  # only there Python allows to change this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


class _PipeWatch(Watch):
    """A `Watch` that sends the progress of the cell through a pipe."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def progress(self, part: float, note: str = "") -> None:
        super().progress(part, note)
        self._connection.send(("progress", (part, note)))


def _measure(connection: Connection, study: Study, config: Config, cell: Cell, folder: Path) -> None:
    """What the process of a cell does."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    watch = _PipeWatch(connection)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the parent process decides
    signal.signal(signal.SIGTERM, lambda *_: watch.stop())
    try:
        connection.send(("done", study.measure(config, cell, folder, watch)))
    except TreePOError as error:
        connection.send(("failed", str(error)))
    except Stopped:
        connection.send(("done", None))
    except BrokenPipeError:
        pass  # the study was killed, so the parent process is gone


def _json(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "overrides": list(cell.overrides)}
