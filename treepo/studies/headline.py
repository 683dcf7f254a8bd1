"""The paper's main comparison: GRPO, GRPO on trees, TreePO; each with the learning rate that suits it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import Field

from treepo.errors import TreePOError
from treepo.run.build import build_actor
from treepo.run.config import Config
from treepo.studies.findings import Arms, Findings, Result, ResultTable, Value
from treepo.studies.statistics import Mean, first_reach
from treepo.studies.study import Cell, Results, Watch, by_arm, from_start, sample_trees, starting_cells
from treepo.studies.training import SCORE, TrainingStudy, cost_table, learning_curves, points, score_table, train

TOKENS, SWEEP = "tokens", "sweep"  # stages before the main one
SWEEP_SEED = 1000  # the first seed of the sweep: its runs decide on rates, and are not reported


class HeadlineStudy(TrainingStudy):
    """Compares GRPO, GRPO on trees and TreePO with equally many leaves, and trees with equally many tokens too.

    More arms use as many tokens as GRPO: trees whose forks are spread over the whole depth; and half the leaves with
    more prompts, once independent and once on a narrow tree with forks at every second level (which
    `treepo study variance` favours).

    The study has three stages. The first measures with the starting model how many tokens a prompt takes with each
    shape. From that follows the number of prompts with which trees generate as many tokens as independent responses.
    The second chooses a learning rate for each arm, by the mean accuracy over the run, because a rate that was tuned
    for one arm would favour it. It uses seeds of its own. The third trains each arm at its chosen rate with new seeds.
    """

    title: ClassVar[str] = "Headline"
    question: ClassVar[str] = (
        "Does TreePO learn more than GRPO, at equal leaves, equal tokens and equal seconds? (arXiv 2508.17445, table 1)"
    )

    rates: list[float] = Field([0.5, 1.0, 2.0], min_length=1, description="Learning rates tried, times trainer.lr.")
    sweep_seeds: int = Field(1, ge=1, description="Seeds with which rates are chosen.")
    token_problems: int = Field(64, ge=1, description="Problems sampled to measure how many tokens a shape takes.")

    def quick(self) -> Self:
        return self.model_copy(update={"seeds": 2, "rates": [1.0], "token_problems": 8})

    def shapes(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Shapes of trees: name -> overrides. The first shape is independent responses."""
        half = f"sampler.width={config.sampler.width // 2}"
        spread = "sampler.branching={divergence: spread, first_divergence: null}"
        return {
            "i.i.d.": ("sampler.mode=iid",),
            "tree": ("sampler.mode=tree",),
            "spread": ("sampler.mode=tree", spread),
            "half": ("sampler.mode=iid", half),
            "narrow": ("sampler.mode=tree", half, "sampler.branching={divergence: 2, first_divergence: 2, every: 2}"),
        }

    def arms_at(self, config: Config, prompts: dict[str, int]) -> dict[str, tuple[str, ...]]:
        """Name of each arm -> overrides. `prompts`: prompts per step with which a shape generates as many tokens as
        independent responses do.
        """
        shapes = self.shapes(config)
        grpo, leaves = "advantage={kind: grpo}", config.sampler.width // 2
        more = {shape: (*shapes[shape], f"trainer.prompts_per_step={n}") for shape, n in prompts.items()}
        return {
            "grpo": (*shapes["i.i.d."], grpo),
            "grpo on trees": (*shapes["tree"], grpo),
            "treepo": shapes["tree"],
            f"treepo, {prompts['tree']} prompts": more["tree"],
            f"spread, {prompts['spread']} prompts": more["spread"],
            f"grpo, {leaves} leaves, {prompts['half']} prompts": (*more["half"], grpo),
            f"narrow, {leaves} leaves, {prompts['narrow']} prompts": more["narrow"],
        }

    def stages(self, config: Config, done: Results) -> Iterator[list[Cell]]:
        sweep_seeds = range(SWEEP_SEED, SWEEP_SEED + self.sweep_seeds)
        yield starting_cells(config, [*sweep_seeds, *range(self.seeds)])
        start = from_start(config, SWEEP_SEED, done)
        yield [Cell(shape, SWEEP_SEED, (*start, *given), TOKENS) for shape, given in self.shapes(config).items()]
        if len(self.rates) > 1:
            arms = self.arms_at(config, self.prompts(config, done))
            yield [
                Cell(_at_rate(arm, rate), seed, (*from_start(config, seed, done), *given, _rate(config, rate)), SWEEP)
                for seed in sweep_seeds
                for arm, given in arms.items()
                for rate in self.rates
            ]
        yield self.main_cells(config, done)

    def main_cells(self, config: Config, done: Results) -> list[Cell]:
        arms = self.arms_at(config, self.prompts(config, done))
        return [
            Cell(arm, seed, (*from_start(config, seed, done), *given, _rate(config, self.best_rate(arm, done))))
            for seed in range(self.seeds)
            for arm, given in arms.items()
        ]

    def prompts(self, config: Config, done: Results) -> dict[str, int]:
        """Prompts per step of each shape that generate as many tokens as those of independent responses."""
        tokens = {arm: next(iter(runs.values()))["tokens_per_prompt"] for arm, runs in by_arm(done, TOKENS).items()}
        independent = next(iter(tokens.values()))
        return {arm: round(config.trainer.prompts_per_step * independent / n) for arm, n in tokens.items()}

    def best_rate(self, arm: str, done: Results) -> float:
        """The factor of `trainer.lr` with the best mean accuracy over the runs of the sweep."""
        if len(self.rates) == 1:
            return self.rates[0]
        return max(self.rates, key=lambda rate: _swept(done, arm, rate))

    def measure_arm(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        if cell.stage == TOKENS:
            return _tokens_per_prompt(config, self.token_problems, watch)
        if cell.stage == SWEEP:
            try:
                return train(config, folder / "run", watch)
            except TreePOError as error:  # a rate may be too high
                return {"failed": str(error)}
        return super().measure_arm(config, cell, folder, watch)

    def findings(self, config: Config, done: Results) -> Findings:
        arms = by_arm(done)
        return Findings(
            (score_table(arms), reach_table(arms), cost_table(arms), *self._sweep_table(config, done)),
            learning_curves(arms),
            (
                f"Arms without a number of prompts in their name have {config.trainer.prompts_per_step} prompts of "
                f"{config.sampler.width} leaves a step. The other arms have as many prompts as it takes to generate as "
                "many tokens a step as grpo does with the starting model.",
                "Differences and ratios are to the first arm, seed by seed. Intervals are 95 %, Student's t.",
            ),
        )

    def _sweep_table(self, config: Config, done: Results) -> Sequence[ResultTable]:
        if len(self.rates) == 1:
            return ()
        arms = self.arms_at(config, self.prompts(config, done))
        rows: list[list[Value]] = [
            [arm, *(_swept(done, arm, rate) for rate in self.rates), f"x{self.best_rate(arm, done):g}"] for arm in arms
        ]
        title = f"mean pass@1 over the runs of the sweep, by rate (times {config.trainer.lr:g})"
        return [ResultTable(title, ("arm", *(f"x{rate:g}" for rate in self.rates), "chosen"), rows)]


def _rate(config: Config, factor: float) -> str:
    return f"trainer.lr={config.trainer.lr * factor!r}"


def _at_rate(arm: str, rate: float) -> str:
    """The name of an arm of the sweep."""
    return f"{arm}, rate x{rate:g}"


def _swept(done: Results, arm: str, rate: float) -> float:
    """Mean accuracy after the start, over the runs of the sweep with this rate. A run that failed counts as 0."""
    runs = by_arm(done, SWEEP)[_at_rate(arm, rate)].values()
    means = [0.0 if "failed" in r else float(np.mean([p[SCORE] for p in r["curve"][1:]])) for r in runs]
    return float(np.mean(means))


def _tokens_per_prompt(config: Config, problems: int, watch: Watch) -> Result:
    with build_actor(config) as actor:
        chosen = {f"tokens/{p}": problem for p, problem in enumerate(actor.task.problems("train")[:problems])}
        scored = sample_trees(actor, config, chosen, lambda done, total: watch.progress(done / total))
    return {
        "tokens_per_prompt": float(np.mean([s.tree.unique_tokens for s in scored])),
        "sharing": float(np.mean([s.tree.flat_tokens / s.tree.unique_tokens for s in scored])),
        "spread": float(np.mean([s.has_spread for s in scored])),
    }


SHARES = (0.5, 0.75, 0.9, 1.0)  # of the baseline's whole gain


def reach_table(arms: Arms) -> ResultTable:
    """Tokens until an arm reaches a share of the baseline's whole gain, divided by the tokens of the baseline.

    The gain is that of the baseline's mean curve over seeds. A seed that never reaches the share has no ratio. The
    table shows how many seeds reach it.
    """
    baseline = next(iter(arms.values()))
    start = float(np.mean([r["curve"][0][SCORE] for r in baseline.values()]))
    gain = float(np.mean([r["curve"][-1][SCORE] for r in baseline.values()])) - start
    rows = []
    for arm, runs in arms.items():
        row: list[Value] = [arm]
        for share in SHARES:
            ours, theirs = (
                {seed: first_reach(*points(r, "tokens"), start + share * gain) for seed, r in found.items()}
                for found in (runs, baseline)
            )
            ratios = [x / y for seed in ours if (x := ours[seed]) and (y := theirs.get(seed))]
            reached = sum(x is not None for x in ours.values())
            row += [Mean.of_ratios(ratios) if ratios else None, f"{reached} of {len(runs)}"]
        rows.append(row)
    columns = [part for share in SHARES for part in (f"to {start + share * gain:.3f}", "seeds")]
    return ResultTable("generated tokens until that accuracy, divided by the baseline's", ("arm", *columns), rows)
