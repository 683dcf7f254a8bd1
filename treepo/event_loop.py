"""One event loop for everything that an engine does, also where a loop is running already (Jupyter, Colab)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class EventLoop:
    """Runs coroutines one after the other on an event loop of its own. A context manager.

    The connections of an engine belong to the loop that made them, so all calls of an engine go through one
    `EventLoop`. A cell of a notebook runs inside a running loop, where `asyncio.run` is refused: there the work is
    done on this loop in another thread, and the cell waits for it.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Ctrl-C cancels it and raises `KeyboardInterrupt`."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # no loop runs in this thread
            return self._runner.run(work)
        with ThreadPoolExecutor(1, thread_name_prefix="treepo") as thread:
            result = thread.submit(self._runner.run, work)
            try:
                return result.result()
            except KeyboardInterrupt:
                self.interrupt()
                raise

    def interrupt(self) -> None:
        """Cancel what runs on this loop in another thread, if anything does."""
        loop = self._runner.get_loop()
        if loop.is_running():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])

    def close(self) -> None:
        """Cancel what is left on the loop and close it."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._runner.close()
        else:
            with ThreadPoolExecutor(1, thread_name_prefix="treepo") as thread:
                thread.submit(self._runner.close).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
