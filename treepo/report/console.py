"""Output of the command line: progress of a run, tables of results, trees drawn as text."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.tree import Tree as Drawing

from treepo.evaluate import Evaluation
from treepo.report.bars import Bars
from treepo.run.metrics import Metrics
from treepo.run.trainer import Observer
from treepo.tree import ROOT, ScoredTree

ACCURACIES = (
    ("greedy pass@1", "greedy"),
    ("sampled pass@1", "pass_at_1"),
    ("pass@{k}", "pass_at_k"),
    ("maj@{k}", "maj_at_k"),
)

TREE_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("problem", "left"),
    ("leaves", "right"),
    ("reward", "right"),
    ("generated", "right"),
    ("flat", "right"),
    ("sharing", "right"),
    ("stops", "left"),
)


class TrainingProgress(Bars, Observer):
    """Shows the progress of a training run.

    A terminal gets a bar with reward, tokens per second and sharing. Elsewhere a line is printed every ten steps.
    """

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(
            console, SpinnerColumn(), TextColumn("{task.description}"), time=TimeRemainingColumn(compact=True)
        )
        self.steps = steps
        self.first: Evaluation | None = None
        self.last: Evaluation | None = None
        self._main = self._bar.add_task("train", total=steps, note="")
        self._part = self._bar.add_task("", total=None, visible=False, note="")

    def warming_up(self, step: int, steps: int, loss: float) -> None:
        self._show_part("warm-up", step, steps, f"loss {loss:.3f}")
        if not self.console.is_terminal and step % max(1, steps // 5) == 0:
            self.console.print(f"warm-up {step}/{steps}  loss {loss:.3f}")

    def sampling(self, step: int, trees_done: int, trees: int) -> None:
        self._show_part(f"sample {step}", trees_done, trees, "trees")

    def evaluating(self, step: int, trees_done: int, trees: int) -> None:
        self._show_part("evaluate", trees_done, trees, "trees")

    def planned(self, attention: str) -> None:
        self.console.print(f"attention of packed rows: {attention}, in the first one", highlight=False)

    def stepped(self, metrics: Metrics) -> None:
        step, reward = metrics["step"], metrics["reward/mean"]
        rate = metrics["tokens/flat"] / max(metrics["seconds/step"], 1e-9)
        shown = "-" if reward is None else f"{reward:.2f}"
        note = f"reward {shown}  {rate:,.0f} tok/s  sharing {metrics['tokens/sharing']:.2f}"
        self._bar.update(self._main, completed=step, note=note)
        if not self.console.is_terminal and (step % 10 == 0 or step == self.steps):
            self.console.print(f"step {step:>5}/{self.steps}  {note}")
        if not metrics["prompts/used"]:
            self.console.print(f"step {step}: all leaves of every prompt had the same reward: no update")

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.first, self.last = self.first or evaluation, evaluation
        found = "  ".join(
            f"{label.format(k=evaluation.samples)} {getattr(evaluation, name).mean:.3f}" for label, name in ACCURACIES
        )
        self.console.print(f"[bold]held out after step {step}[/]  {found}", soft_wrap=True)

    def _show_part(self, name: str, done: int, total: int, note: str) -> None:
        self._bar.update(
            self._part,
            description=name,
            completed=done,
            total=total,
            note=note,
            visible=done < total,
            refresh=done == total,
        )


class SamplingProgress(Bars):
    """Shows every tree when it is finished.

    A terminal gets the rows of a table above a progress bar. Elsewhere a line is printed for every tree.
    """

    def __init__(self, console: Console, problem_ids: Sequence[str]) -> None:
        super().__init__(console, SpinnerColumn(), TextColumn("sample"), time=TimeElapsedColumn())
        self.problems = len(problem_ids)
        self._widest = max(map(len, problem_ids), default=0)  # characters
        self._rewards: list[float] = []
        self._trees = self._tokens = 0
        self._start = time.perf_counter()
        self._task = self._bar.add_task("", total=self.problems, note="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._print_row([name for name, _ in TREE_COLUMNS], style="bold")
        return super().__enter__()

    def add(self, scored: ScoredTree) -> None:
        """Show a tree that is finished and scored."""
        self._trees += 1
        self._tokens += scored.tree.flat_tokens
        self._rewards += [reward for reward in scored.rewards if reward is not None]
        rate = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        note = f"reward {_mean(self._rewards)}  {rate:,.0f} tok/s"
        cells = _cells(scored)
        if self.console.is_terminal:
            self._print_row(cells)
            self._bar.update(self._task, completed=self._trees, note=note)
        else:
            named = [f"{name} {cell}" for (name, _), cell in zip(TREE_COLUMNS, cells, strict=True)]
            self.console.print(
                f"{self._trees}/{self.problems}  {'  '.join(named)}", soft_wrap=True, highlight=False, markup=False
            )

    def _print_row(self, cells: Sequence[str], style: str = "") -> None:
        # The rows are printed one by one. Columns of fixed width keep them aligned.
        row = Table(box=None, show_header=False, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        row.add_column(width=max(self._widest, len("problem")), overflow="fold")
        for name, _ in TREE_COLUMNS[1:-1]:
            row.add_column(width=max(len(name), 7), justify="right")
        row.add_column(ratio=1)
        row.add_row(*map(escape, cells), style=style)
        self.console.print(row)


def held_out_table(columns: Sequence[tuple[str, Evaluation]]) -> Table:
    """Accuracies with 95 % intervals, one column per (title, evaluation)."""
    first = columns[0][1]
    table = Table(title=f"held out: problems {first.problems}, samples of each {first.samples} (95 % intervals)")
    table.add_column("")
    for title, _ in columns:
        table.add_column(title, justify="right")
    for label, name in ACCURACIES:
        table.add_row(label.format(k=first.samples), *(escape(str(getattr(e, name))) for _, e in columns))
    table.add_row("response tokens", *(f"{e.response_tokens:.1f}" for _, e in columns))
    if any(e.unscored for _, e in columns):
        table.add_row("without reward (count as wrong)", *(str(e.unscored) for _, e in columns))
    return table


def tree_table(trees: Sequence[ScoredTree]) -> Table:
    """The sampled trees, one row per tree."""
    table = Table(title="1 tree" if len(trees) == 1 else f"{len(trees)} trees")
    for name, justify in TREE_COLUMNS:
        table.add_column(name, justify=justify, overflow="fold")
    for scored in trees:
        table.add_row(*map(escape, _cells(scored)))
    return table


def _cells(scored: ScoredTree) -> list[str]:
    """The texts of a tree for `TREE_COLUMNS`."""
    tree = scored.tree
    stops = Counter(str(tree.nodes[leaf].stop) for leaf in tree.leaves())
    return [
        scored.problem_id,
        str(len(scored.rewards)),
        _mean([reward for reward in scored.rewards if reward is not None]),
        str(tree.unique_tokens),
        str(tree.flat_tokens),
        f"{tree.flat_tokens / max(1, tree.unique_tokens):.2f}",
        ", ".join(f"{name} {n}" for name, n in stops.most_common()),
    ]


def _mean(rewards: Sequence[float]) -> str:
    return f"{sum(rewards) / len(rewards):.2f}" if rewards else "-"


def drawing(scored: ScoredTree, decode: Callable[[Sequence[int]], str], width: int = 60) -> Drawing:
    """The tree as text, forks as branches. `·` separates segments. A leaf shows why it ended and its reward."""
    tree = scored.tree
    reward = dict(zip(tree.leaves(), scored.rewards, strict=True))

    def text(chain: list[int]) -> str:
        line = "·".join(decode(tree.nodes[node].tokens).replace("\n", "\\n") for node in chain)
        line = line if len(line) <= width else f"{line[: width // 2 - 1]}…{line[-width // 2 :]}"
        leaf = chain[-1]
        if leaf not in reward:
            return escape(line)
        value = reward[leaf]
        style = "dim" if value is None else "green" if value > 0 else "red"
        shown = scored.reasons.get(leaf, "?") if value is None else f"{value:g}"
        return f"{escape(line)}  [{style}]{tree.nodes[leaf].stop} {escape(shown)}[/]"

    drawn = Drawing(f"[bold]{escape(decode(tree.prompt))}[/]")
    todo = [(ROOT, drawn)]
    while todo:
        node, place = todo.pop()
        for child in tree.children[node]:
            chain = [child]
            while len(tree.children[chain[-1]]) == 1:
                chain += tree.children[chain[-1]]
            todo.append((chain[-1], place.add(text(chain))))
    return drawn


def print_saved(console: Console, **paths: Path | Any) -> None:
    """Print a line for every file that was written: its name and path. None is left out."""
    for name, path in paths.items():
        if path is not None:
            console.print(f"{name.replace('_', ' ')}: {path}", soft_wrap=True, highlight=False)
