"""One event loop for all calls of an engine. It also works inside a running loop, as in Jupyter or Colab."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class EventLoop:
    """A new event loop that runs coroutines one after the other. A context manager.

    The connections of an engine belong to the loop that made them, so all calls of an engine must use one `EventLoop`.
    A notebook cell runs inside a running loop, where `asyncio.run` raises an error. In this case the coroutine runs in
    another thread, and the cell waits for it.
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
        """Cancel everything that runs on this loop in another thread."""
        loop = self._runner.get_loop()
        if loop.is_running():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])

    def close(self) -> None:
        """Cancel the remaining tasks of the loop and close it."""
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
