"""What the command line shows: progress of a run, tables of results, a tree drawn as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.tree import Tree as Drawing

from treepo.evaluate import Evaluation
from treepo.folder import Metrics
from treepo.trainer import Observer
from treepo.tree import ROOT, Rollout

ROWS = (
    ("greedy pass@1", "greedy"),
    ("sampled pass@1", "pass_at_1"),
    ("pass@{k}", "pass_at_k"),
    ("maj@{k}", "maj_at_k"),
)


class Progressing(Observer):
    """Shows a run: a bar with reward, tokens/s and sharing on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps
        self.first: Evaluation | None = None
        self.last: Evaluation | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._main = self._bar.add_task("train", total=steps, note="")
        self._part = self._bar.add_task("", total=None, visible=False, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def warming_up(self, step: int, steps: int, loss: float) -> None:
        self._show_part("warm-up", step, steps, f"loss {loss:.3f}")
        if not self.console.is_terminal and step % max(1, steps // 5) == 0:
            self.console.print(f"warm-up {step}/{steps}  loss {loss:.3f}")

    def sampling(self, step: int, trees_done: int, trees: int) -> None:
        self._show_part(f"sample {step}", trees_done, trees, "trees")

    def evaluating(self, step: int, trees_done: int, trees: int) -> None:
        self._show_part("evaluate", trees_done, trees, "trees")

    def stepped(self, metrics: Metrics) -> None:
        reward = "-" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
        rate = metrics["tokens_flat"] / max(metrics["seconds"]["step"], 1e-9)
        note = f"reward {reward}  {rate:,.0f} tok/s  sharing {metrics['sharing']:.2f}"
        self._bar.update(self._main, completed=metrics["step"], note=note)
        if not self.console.is_terminal and (metrics["step"] % 10 == 0 or metrics["step"] == self.steps):
            self.console.print(f"step {metrics['step']:>5}/{self.steps}  {note}")
        if not metrics["queries_used"]:
            self.console.print(f"step {metrics['step']}: all leaves of every query had the same reward: no update")

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.first, self.last = self.first or evaluation, evaluation
        found = "  ".join(
            f"{label.format(k=evaluation.samples)} {getattr(evaluation, name).mean:.3f}" for label, name in ROWS
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


def held_out_table(columns: Sequence[tuple[str, Evaluation]]) -> Table:
    """Accuracies with 95 % intervals, one column per (title, evaluation)."""
    first = columns[0][1]
    table = Table(title=f"held out: problems {first.problems}, samples of each {first.samples} (95 % intervals)")
    table.add_column("")
    for title, _ in columns:
        table.add_column(title, justify="right")
    for label, name in ROWS:
        table.add_row(label.format(k=first.samples), *(escape(str(getattr(e, name))) for _, e in columns))
    table.add_row("response tokens", *(f"{e.response_tokens:.1f}" for _, e in columns))
    if any(e.unscored for _, e in columns):
        table.add_row("without reward (count as wrong)", *(str(e.unscored) for _, e in columns))
    return table


def rollout_table(rollouts: Sequence[Rollout]) -> Table:
    """What was sampled, a row per tree."""
    table = Table(title="1 tree" if len(rollouts) == 1 else f"{len(rollouts)} trees")
    for name, justify in (
        ("problem", "left"),
        *((n, "right") for n in ("leaves", "reward", "generated", "flat", "sharing")),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("stops")
    for r in rollouts:
        known = [reward for reward in r.rewards if reward is not None]
        stops = Counter(str(r.tree.nodes[leaf].stop) for leaf in r.tree.leaves())
        table.add_row(
            escape(r.problem_id),
            str(len(r.rewards)),
            f"{sum(known) / len(known):.2f}" if known else "-",
            str(r.tree.unique_tokens),
            str(r.tree.flat_tokens),
            f"{r.tree.flat_tokens / max(1, r.tree.unique_tokens):.2f}",
            ", ".join(f"{name} {n}" for name, n in stops.most_common()),
        )
    return table


def drawing(rollout: Rollout, decode: Callable[[Sequence[int]], str], width: int = 60) -> Drawing:
    """The tree as text, forks as branches: segments parted by `·`, and at a leaf why it ended and what it is worth."""
    tree = rollout.tree
    reward = dict(zip(tree.leaves(), rollout.rewards, strict=True))

    def text(chain: list[int]) -> str:
        line = "·".join(decode(tree.nodes[node].tokens).replace("\n", "\\n") for node in chain)
        line = line if len(line) <= width else f"{line[: width // 2 - 1]}…{line[-width // 2 :]}"
        leaf = chain[-1]
        if leaf not in reward:
            return escape(line)
        worth = reward[leaf]
        style = "dim" if worth is None else "green" if worth > 0 else "red"
        shown = rollout.reasons.get(leaf, "?") if worth is None else f"{worth:g}"
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
    """A line per thing that was written."""
    for name, path in paths.items():
        if path is not None:
            console.print(f"{name.replace('_', ' ')}: {path}", soft_wrap=True, highlight=False)
