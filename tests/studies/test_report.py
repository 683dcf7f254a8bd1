"""How results are shown: numbers with intervals, the progress and the curve of a training run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from treepo.report.console import TrainingProgress
from treepo.report.curve import draw_curve
from treepo.report.study import terminal_table, text
from treepo.run.config import Config
from treepo.run.folder import RunFolder
from treepo.studies.findings import ResultTable
from treepo.studies.statistics import Mean


def test_numbers_are_written_with_their_intervals() -> None:
    values = [
        None,
        "x",
        7,
        0.12345,
        12.345,
        4321.0,
        Mean(0.5, 0.4, 0.6, 5),
        Mean(1.5, 1.2, 2.0, 5),
        Mean(0.5, None, None, 1),
    ]
    shown = ["-", "x", "7", "0.123", "12.3", "4,321", "0.500 ±0.100", "1.500 [1.200, 2.00]", "0.500"]
    assert [text(v) for v in values] == shown
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(terminal_table(ResultTable("t [1]", ("arm", "end"), (("a[0]", Mean(0.5, 0.4, 0.6, 5)),))))
    assert "a[0]" in (shown_table := console.export_text()) and "t [1]" in shown_table


STEP = {
    "step": 1,
    "reward/mean": 0.25,
    "tokens/flat": 300,
    "tokens/generated": 100,
    "tokens/sharing": 3.0,
    "seconds/step": 2.0,
    "prompts/used": 2,
}
ACCURACIES = {"greedy/pass@1": 0.4, "sampled/pass@1": 0.3, "sampled/pass@4": 0.6, "sampled/maj@4": 0.5}
EVALUATION = {"step": 1, "eval/problems": 8, "eval/samples": 4} | {
    f"eval/{name}{end}": mean + off
    for name, mean in ACCURACIES.items()
    for end, off in (("", 0.0), ("/low", -0.1), ("/high", 0.1))
}


def test_a_step_is_a_line_with_reward_tokens_per_second_and_sharing() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    progress = TrainingProgress(console, steps=1)
    progress.stepped(STEP)
    progress.stepped(STEP | {"reward/mean": None, "prompts/used": 0})
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert shown[0] == "step     1/1  reward 0.25  150 tok/s  sharing 3.00"
    assert "reward -" in shown[1] and shown[2].endswith("all leaves of every prompt had the same reward: no update")


@pytest.mark.parametrize("changed", ["reward/mean", "tokens/flat", "eval/greedy/pass@1", "eval/sampled/maj@4/high"])
def test_the_learning_curve_shows_rewards_tokens_and_accuracies_with_intervals(config: Config, changed: str) -> None:
    folder = RunFolder(config.out, {}, resume=False)
    assert draw_curve(folder) is None
    for step in (STEP, EVALUATION):
        for n in (1, 2):
            folder.record(step | {"step": n})
    path = draw_curve(folder)
    assert path and path.name == "curve.png"
    before = path.read_bytes()
    assert before[:4] == b"\x89PNG" and draw_curve(folder) and path.read_bytes() == before
    other = STEP | {changed: 0.9} if changed in STEP else EVALUATION | {changed: 0.9}
    folder.record(other | {"step": 3})
    folder.record((EVALUATION if changed in STEP else STEP) | {"step": 3})
    Path(path).unlink()
    assert draw_curve(folder) and path.read_bytes() != before
