"""What all benchmarks share: arguments, a fair clock, a table, and the JSON object on the last line."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from treepo.report.machine import device, versions


def arguments(description: str, repeats: int | None = 3) -> argparse.Namespace:
    """The arguments of the command line: `quick`, `out`, `threads` and `repeats`. Torch gets `threads` CPU threads.

    `repeats`: the default of that argument; None: there is no such argument.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version that ends within a minute")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    if repeats is not None:
        parser.add_argument(
            "--repeats", type=int, default=repeats, help=f"counted runs of what is timed in turns (default {repeats})"
        )
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    return args


def clock() -> float:
    """Seconds. CPU time if torch has one thread, so that other programs have little effect; else wall clock."""
    import torch

    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def alternate(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds (`clock`) for each function.

    The functions take turns within every repeat, so a slow time of the machine affects all of them. One uncounted round
    comes first. A function that queues work on an accelerator must wait for it before it returns.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def fastest(sizes: Sequence[int], step: Callable[[int], object]) -> int:
    """The size with which `step` is fastest. Each size is run twice, and the better run counts."""
    seconds = dict.fromkeys(sizes, float("inf"))
    for size in (*sizes, *sizes):
        start = clock()
        step(size)
        seconds[size] = min(seconds[size], clock() - start)
    return min(sizes, key=seconds.__getitem__)


def finish(
    name: str, results: Sequence[Mapping[str, Any]], args: argparse.Namespace, columns: Sequence[str] | None = None
) -> None:
    """Print `results` as a table of `columns` (default: the keys of the first result), then all as one JSON line."""
    table = Table(title=name)
    columns = list(results[0]) if columns is None else columns
    for column in columns:
        number = any(isinstance(row.get(column), int | float) for row in results)
        table.add_column(column, justify="right" if number else "left")
    for row in results:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(keep(name, results, args), flush=True)


def keep(name: str, results: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> str:
    """The JSON line of `results`. It is written to `args.out`, if given; long benchmarks do so after each result."""
    line = json.dumps(
        {
            "name": name,
            "quick": args.quick,
            "results": [dict(row) for row in results],
            "versions": versions(),
            "device": device(),
            "commit": commit(),
        }
    )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    return line


def commit() -> str:
    """The short hash of the checkout that holds this file, `-dirty` if it has changes, or `unknown`.

    Files in `results` do not count as changes, because long benchmarks write them while they run.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603
        changes = [*git, "status", "--porcelain", "--", ":/", ":(exclude)results"]
        status = subprocess.run(changes, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
