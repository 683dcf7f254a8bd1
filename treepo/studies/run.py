"""Runs the cells of a study, each in a process of its own, and keeps every result as soon as it is there."""

from __future__ import annotations

import json
import multiprocessing
import signal
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from treepo import __version__
from treepo.errors import ConfigError, TreePOError
from treepo.files import writing
from treepo.run.config import Config
from treepo.studies.study import Cell, Result, Stopped, Study, Watch, of_cell

AGAIN = "mend it, and the same command goes on"
MAY_CHANGE = {"seeds", "jobs"}  # of a study that goes on


class Listener:
    """Hears how a study goes. This one does not look; the command line's shows progress."""

    def planned(self, done: int, known: int) -> None:
        """So many cells are done, of so many that can be named by now."""

    def progress(self, cell: Cell, part: float, note: str) -> None: ...

    def finished(self, cell: Cell, result: Result) -> None: ...

    def stopped(self, cell: Cell) -> None: ...


class Runner:
    """A study in its folder. The same study with the same configuration goes on where it was stopped."""

    def __init__(self, name: str, study: Study, config: Config, folder: Path, listener: Listener | None = None) -> None:
        if config.engine.kind == "server" and study.jobs > 1:
            raise ConfigError(
                "study.jobs: cells side by side would send their weights to the same servers: set study.jobs=1, or "
                "engine.kind=local"
            )
        self.study, self.config, self.folder = study, config, folder
        self.listener = listener or Listener()
        self.done: dict[Cell, Result] = {}
        self.stopping = False
        self._running: dict[Connection, tuple[SpawnProcess, Cell]] = {}
        self._claim(name)

    def __call__(self) -> bool:
        """Measure what is missing; whether all is done, and not stopped before."""
        try:
            while waiting := self._missing():
                while (waiting or self._running) and not (self.stopping and not self._running):
                    while waiting and len(self._running) < self.study.jobs and not self.stopping:
                        self._start(waiting.pop(0))
                    for connection in wait(list(self._running)):
                        self._hear(connection)  # type: ignore[arg-type]
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
        """Ask the cells under way to end soon, in a state from which they can go on."""
        self.stopping = True
        for process, _ in self._running.values():
            process.terminate()

    def _missing(self) -> list[Cell]:
        cells = self.study.cells(self.config, self.done)
        if len({cell.name for cell in cells}) < len(cells):
            raise ValueError("two cells have one name")
        for cell in cells:
            if cell not in self.done and (found := self._kept(cell)) is not None:
                self.done[cell] = found
        self.done = {cell: self.done[cell] for cell in cells if cell in self.done}
        self.listener.planned(len(self.done), len(cells))
        # Of cells kept just now the study may make more.
        missing = [cell for cell in cells if cell not in self.done]
        if not missing and len(self.study.cells(self.config, self.done)) > len(cells):
            return self._missing()
        return missing

    def _kept(self, cell: Cell) -> Result | None:
        path = self._result(cell)
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["cell"] != _json(cell):
            raise ConfigError(f"{path}: belongs to another version of this study: start a new one (out=...)")
        result: Result = kept["result"]
        return result

    def _start(self, cell: Cell) -> None:
        folder = self.folder / "cells" / cell.name
        with writing(folder, AGAIN):
            folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(theirs, self.study, of_cell(self.config, cell), cell, folder))
        process.start()
        theirs.close()
        self._running[ours] = process, cell

    def _hear(self, connection: Connection) -> None:
        process, cell = self._running[connection]
        try:
            kind, content = connection.recv()
        except EOFError:
            process.join()
            del self._running[connection]
            raise TreePOError(
                f"{cell.name}: its process ended with status {process.exitcode} (its last words are above); "
                "the same command goes on with the cells that are missing"
            ) from None
        if kind == "progress":
            self.listener.progress(cell, *content)
            return
        process.join()
        del self._running[connection]
        if kind == "failed":
            raise TreePOError(f"{cell.name}: {content}")
        if content is None:
            self.listener.stopped(cell)
            return
        path = self._result(cell)
        part = path.with_name(f".{path.name}.part")
        with writing(path, AGAIN):
            part.write_text(json.dumps({"cell": _json(cell), "result": content}) + "\n", encoding="utf-8")
            part.replace(path)
        self.done[cell] = content
        self.listener.finished(cell, content)

    def _result(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name / "result.json"

    def _claim(self, name: str) -> None:
        """Write what study this is; raise `ConfigError` if the folder holds another one."""
        path = self.folder / "study.json"
        settings = self.study.model_dump(mode="json", exclude=MAY_CHANGE)
        ours = {"study": name, "settings": settings, "config": self.config.model_dump(mode="json", exclude={"out"})}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            kept.pop("treepo")
            if kept != ours:
                changed = [key for key in ours if kept.get(key) != ours[key]]
                raise ConfigError(
                    f"out: {self.folder} holds a study with another {' and '.join(changed)}: take its own again, or "
                    "another folder (out=...)"
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"out: {self.folder} is in use and holds no study: choose another folder (out=...)")
        with writing(path, AGAIN):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"treepo": __version__, **ours}, indent=1) + "\n", encoding="utf-8")


class _Telling(Watch):
    """A `Watch` at the other end of a pipe."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def progress(self, part: float, note: str = "") -> None:
        super().progress(part, note)
        self._connection.send(("progress", (part, note)))


def _measure(connection: Connection, study: Study, config: Config, cell: Cell, folder: Path) -> None:
    """The life of a cell's process."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    watch = _Telling(connection)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; who started us decides
    signal.signal(signal.SIGTERM, lambda *_: watch.stop())
    try:
        connection.send(("done", study.measure(config, cell, folder, watch)))
    except TreePOError as error:
        connection.send(("failed", str(error)))
    except Stopped:
        connection.send(("done", None))
    except BrokenPipeError:
        pass  # nobody listens any more: the study was killed


def _json(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "overrides": list(cell.overrides)}
