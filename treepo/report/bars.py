"""Progress bars, shown while a context is open and only on a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn


class Bars:
    """Holds the bars `_bar`. Their columns: `before`, the bar, how much is done, the `note` of the task, and `time`."""

    def __init__(self, console: Console, *before: ProgressColumn, time: ProgressColumn) -> None:
        self.console = console
        self._bar = Progress(
            *before,
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            time,
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
