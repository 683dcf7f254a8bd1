"""Studies that train: every arm from the same starting model, on the same problems, for the same number of steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from treepo.errors import ConfigError
from treepo.run.build import training
from treepo.run.config import Config, changed
from treepo.run.folder import read_metrics
from treepo.run.metrics import Metrics
from treepo.run.trainer import Observer
from treepo.studies.findings import Arms, Curve, Findings, Plot, Result, ResultTable, Value, mean_rows
from treepo.studies.statistics import Mean, at, band, paired
from treepo.studies.study import Cell, Results, Study, Watch, by_arm

SCORE = "pass_at_1"  # arms are compared by their sampled accuracy on held-out problems


class TrainingStudy(Study):
    """A study whose arms are trained."""

    def quick_config(self) -> Sequence[str]:
        return ("trainer.steps=10", "trainer.eval_every=5", "evaluate.problems=32", "evaluate.samples=8")

    def cells(self, config: Config, done: Results) -> list[Cell]:
        if not config.trainer.eval_every:
            raise ConfigError("trainer.eval_every=0: a study that trains compares held-out evaluations: set it above 0")
        return super().cells(config, done)

    def measure_arm(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        return train(config, folder / "run", watch)

    def findings(self, config: Config, done: Results) -> Findings:
        arms = by_arm(done)
        return Findings((score_table(arms), cost_table(arms)), learning_curves(arms))


def train(config: Config, folder: Path, watch: Watch) -> Result | None:
    """Run `config` in `folder`, or continue there. None if it was asked to stop. At the end only metrics are kept."""
    run = changed(config, [f"out={folder}"])
    with training(run, resume=(folder / "config.yaml").exists(), observer=_StepNotes(watch, run)) as trainer:
        watch.on_stop(trainer.stop)
        if watch.stopping:
            trainer.stop()
        trainer.run()
        if trainer.state.step < run.trainer.steps:
            return None
    found = summary(read_metrics(folder / "metrics.jsonl"))
    shutil.rmtree(folder / "checkpoints")
    return found


class _StepNotes(Observer):
    """Reports every training step as progress of the cell."""

    def __init__(self, watch: Watch, config: Config) -> None:
        self._watch, self._steps = watch, config.trainer.steps

    def stepped(self, metrics: Metrics) -> None:
        step, reward = metrics["step"], metrics["reward/mean"]
        note = f"step {step}/{self._steps}" + ("" if reward is None else f", reward {reward:.2f}")
        self._watch.progress(step / self._steps, note)


def summary(metrics: Sequence[Metrics]) -> Result:
    """What is kept of a run: its held-out curve over steps, tokens and seconds, and means over its steps."""
    steps = [m for m in metrics if "tokens/generated" in m]
    tokens, seconds = {0: 0}, {0: 0.0}
    for m in steps:
        tokens[m["step"]] = tokens[m["step"] - 1] + m["tokens/generated"]
        seconds[m["step"]] = seconds[m["step"] - 1] + m["seconds/step"]
    curve = [
        {"step": m["step"], "tokens": tokens[m["step"]], "seconds": seconds[m["step"]]} | held_out(m)
        for m in metrics
        if "eval/samples" in m
    ]
    return {
        "curve": curve,
        "tokens": tokens[steps[-1]["step"]],
        "seconds": seconds[steps[-1]["step"]],
        "sharing": float(np.mean([m["tokens/sharing"] for m in steps])),
        "prompts_used": sum(m["prompts/used"] for m in steps) / sum(m["prompts/sampled"] for m in steps),
        "response_tokens": float(np.mean([m["response_tokens/mean"] for m in steps])),
        "entropy": [m["entropy/sampled"] for m in steps],
        "reward": [m["reward/mean"] for m in steps],
    }


def held_out(metrics: Metrics) -> dict[str, Any]:
    """The accuracies and the mean response length of an evaluation's line in `metrics.jsonl`."""
    k = metrics["eval/samples"]
    return {
        "pass_at_1": metrics["eval/sampled/pass@1"],
        "greedy": metrics["eval/greedy/pass@1"],
        "pass_at_k": metrics[f"eval/sampled/pass@{k}"],
        "maj_at_k": metrics[f"eval/sampled/maj@{k}"],
        "response_tokens": metrics["eval/response_tokens/mean"],
    }


# Tables and plots of trained arms ---------------------------------------------------------------------------------


def points(result: Result, x: str, y: str = SCORE) -> tuple[list[float], list[float]]:
    """The held-out curve of a run over `x`: step, tokens or seconds."""
    return [p[x] for p in result["curve"]], [p[y] for p in result["curve"]]


def score_table(arms: Arms) -> ResultTable:
    """Held-out accuracy at equal steps, equal tokens and equal seconds, each with its difference to the baseline."""
    scores: dict[str, Callable[[Result], float]] = {"end": lambda r: r["curve"][-1][SCORE]}
    for x in ("tokens", "seconds"):
        least = min(r["curve"][-1][x] for runs in arms.values() for r in runs.values())
        scores[f"{_short(least)} {x}"] = partial(_score_at, x, least)
    baseline = next(iter(arms))
    rows = []
    for arm, runs in arms.items():
        row: list[Value] = [arm]
        for score in scores.values():
            found = {seed: score(r) for seed, r in runs.items()}
            theirs = {seed: score(r) for seed, r in arms[baseline].items()}
            row += [Mean.of(list(found.values())), None if arm == baseline else paired(found, theirs)]
        rows.append(row)
    columns = [part for name in scores for part in (f"at {name}" if name != "end" else "at the end", "difference")]
    return ResultTable("held-out sampled pass@1", ("arm", *columns), rows)


def _score_at(x: str, where: float, result: Result) -> float:
    return at(*points(result, x), where)


def cost_table(arms: Arms) -> ResultTable:
    """Tokens and seconds of the runs, and what they sampled."""
    columns: dict[str, Callable[[Result], float]] = {
        "tokens, k": lambda r: r["tokens"] / 1000,
        "seconds": lambda r: r["seconds"],
        "sharing": lambda r: r["sharing"],
        "prompts with spread": lambda r: r["prompts_used"],
        "response tokens": lambda r: r["response_tokens"],
        "greedy": lambda r: r["curve"][-1]["greedy"],
        "pass@k": lambda r: r["curve"][-1]["pass_at_k"],
        "maj@k": lambda r: r["curve"][-1]["maj_at_k"],
    }
    return ResultTable("cost of the runs", ("arm", *columns), mean_rows(arms, list(columns.values())))


def learning_curves(arms: Arms) -> tuple[Plot, ...]:
    """Accuracy over generated tokens, steps and seconds."""
    names = {"tokens": "generated tokens", "step": "steps", "seconds": "seconds in steps"}
    return tuple(
        Plot(
            name,
            "held-out sampled pass@1",
            tuple(_curve(arm, [points(r, x) for r in runs.values()]) for arm, runs in arms.items()),
        )
        for x, name in names.items()
    )


def _curve(label: str, found: Sequence[tuple[list[float], list[float]]]) -> Curve:
    grid, means = band(found)
    return Curve(label, grid.tolist(), means)


def _short(number: float) -> str:
    return f"{number / 1000:.0f}k" if number >= 10_000 else f"{number:.0f}"


# The paper's ablations --------------------------------------------------------------------------------------------


class SegmentStudy(TrainingStudy):
    """Trains with several segment lengths at the same response budget: many short segments or few long ones."""

    title: ClassVar[str] = "Segment length"
    question: ClassVar[str] = "How long should a segment be, at one response budget? (arXiv 2508.17445, section 4.4)"

    segment_tokens: list[int] = Field(
        [],
        description="Segment lengths that divide the response budget. Default: half, one, two and four times the "
        "configuration's length.",
    )

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        own, budget = config.sampler.segment_tokens, config.sampler.response_tokens
        lengths = self.segment_tokens or [own, *(n for n in (own // 2, 2 * own, 4 * own) if n and budget % n == 0)]
        for n in lengths:
            if budget % n:
                raise ConfigError(f"study.segment_tokens: {n} does not divide the response budget of {budget} tokens")
        return {
            f"{budget // n} x {n}": (f"sampler.segment_tokens={n}", f"sampler.max_depth={budget // n}")
            for n in dict.fromkeys(lengths)
        }


class BranchingStudy(TrainingStudy):
    """Trains with several rules for which paths fork, and at which levels."""

    title: ClassVar[str] = "Branching"
    question: ClassVar[str] = "Which paths should fork, and at which levels? (arXiv 2508.17445, section 4.4)"

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        budget = "sampler.branching={{divergence: 2, first_divergence: 2, {}}}"
        arms = {
            "uniform": budget.format("allocation: uniform"),
            "low prob": budget.format("allocation: low_prob"),
            "low prob, scheduled": budget.format("allocation: low_prob, temperature: [5.0, 1.0]"),
            "high prob": budget.format("allocation: high_prob"),
            "entropy": budget.format("allocation: entropy"),
            "every second level": budget.format("every: 2"),
            "no transfer": budget.format("transfer: false"),
            "spread": "sampler.branching={divergence: spread, first_divergence: null}",
        }
        return {name: (override,) for name, override in arms.items()}


class FallbackStudy(TrainingStudy):
    """Trains with several fallbacks: where a tree continues when all paths have ended and leaves are still missing."""

    title: ClassVar[str] = "Fallback"
    question: ClassVar[str] = (
        "Where should a tree continue when all its paths have ended and leaves are still missing? "
        "(arXiv 2508.17445, section 4.4)"
    )

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        # The window is no multiple of a segment, and a segment is no multiple of the window.
        window = config.sampler.segment_tokens // 2 + 1
        arms = {
            "segment": "{kind: segment}",
            f"grid of {window}": f"{{kind: grid, window: {window}}}",
            "root": "{kind: root}",
            "lowest log-prob": "{kind: lowest_logprob}",
            "block, low": f"{{kind: block, window: {window}, prefer: low}}",
            "block, high": f"{{kind: block, window: {window}, prefer: high}}",
            "longest first": "{kind: segment, order: longest_first}",
            "none": "{kind: none}",
        }
        return {name: (f"sampler.fallback={value}",) for name, value in arms.items()}


class AdvantageStudy(TrainingStudy):
    """Trains with several advantage estimators on trees of the same shape."""

    title: ClassVar[str] = "Advantage"
    question: ClassVar[str] = (
        "Which advantage estimator learns best on trees of the same shape? (arXiv 2508.17445, section 4.4)"
    )

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        kinds = {
            "treepo, eq. 5": "{kind: treepo}",
            "size-weighted, eq. 6": "{kind: treepo, size_weighted: true}",
            "rejection, eq. 7": "{kind: treepo, reject_flat_groups: true}",
            "no root": "{kind: treepo, use_root: false}",
            "each fork once": "{kind: treepo, levels: fork}",
            "segment": "{kind: segment}",
            "spo": "{kind: spo, whiten: true}",
            "grpo on trees": "{kind: grpo}",
        }
        return {name: (f"advantage={value}",) for name, value in kinds.items()}


class DivergenceStudy(TrainingStudy):
    """Trains with several numbers of children of the root."""

    title: ClassVar[str] = "First divergence"
    question: ClassVar[str] = "How many children should the root of a tree have? (arXiv 2508.17445, section 4.2)"

    first: list[int | tuple[int, int]] = Field(
        [2, 4, 8, (2, 8)],
        min_length=1,
        description="Children of the root, or ranges to draw from.",
    )

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        names = {" to ".join(map(str, n)) if isinstance(n, tuple) else str(n): n for n in self.first}
        return {f"first {name}": (f"sampler.branching.first_divergence={json.dumps(n)}",) for name, n in names.items()}
