"""The paper's main comparison: GRPO, GRPO on trees, TreePO; each with the learning rate that suits it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import Field

from treepo.errors import TreePOError
from treepo.run.build import build_actor
from treepo.run.config import Config
from treepo.studies.statistics import Mean, first_reach
from treepo.studies.study import (
    Cell,
    Findings,
    Result,
    Results,
    Table,
    Value,
    Watch,
    by_arm,
    from_start,
    starting_cells,
)
from treepo.studies.training import SCORE, Arms, Training, cost_table, curves, points, score_table, train

TOKENS, SWEEP = "tokens", "sweep"  # stages before the main one
SWEEP_SEED = 1000  # the first seed of the sweep: its runs decide on rates, and are not reported


class Headline(Training):
    """GRPO, GRPO on trees and TreePO at equal leaves; trees at equal tokens too; learning rates swept per arm.

    Besides, at equal tokens: forks spread over the whole depth; half the leaves and more queries, independent and on a
    narrow tree with forks at every second level, which `treepo study variance` favours. Three stages. How many tokens a
    query of each shape takes is measured with the starting model, and gives the number of queries with which trees
    spend as much as independent answers do. Learning rates are chosen per arm with seeds of their own, by the mean
    accuracy over the run: one rate tuned for one arm would decide the winner. Then the chosen ones run with fresh
    seeds.
    """

    title: ClassVar[str] = "Headline"
    question: ClassVar[str] = (
        "Does TreePO learn more than GRPO, at equal leaves, equal tokens and equal seconds? (arXiv 2508.17445, table 1)"
    )

    rates: list[float] = Field([0.5, 1.0, 2.0], min_length=1, description="Learning rates tried, times trainer.lr.")
    sweep_seeds: int = Field(1, ge=1, description="Seeds with which rates are chosen.")
    token_problems: int = Field(64, ge=1, description="Queries sampled to find out what a shape costs.")

    def quick(self) -> Self:
        return self.model_copy(update={"seeds": 2, "rates": [1.0], "token_problems": 8})

    def shapes(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Ways to sample: name -> overrides. The first is that of independent answers."""
        half = f"sampler.width={config.sampler.width // 2}"
        spread = "sampler.branching={divergence: spread, first_divergence: null}"
        return {
            "i.i.d.": ("sampler.mode=iid",),
            "tree": ("sampler.mode=tree",),
            "spread": ("sampler.mode=tree", spread),
            "half": ("sampler.mode=iid", half),
            "narrow": ("sampler.mode=tree", half, "sampler.branching={divergence: 2, first_divergence: 2, every: 2}"),
        }

    def arms_at(self, config: Config, queries: dict[str, int]) -> dict[str, tuple[str, ...]]:
        """Name -> overrides, where `queries` of each shape cost as much as the configuration's independent ones."""
        shapes = self.shapes(config)
        grpo, leaves = "advantage={kind: grpo}", config.sampler.width // 2
        more = {shape: (*shapes[shape], f"trainer.prompts_per_step={n}") for shape, n in queries.items()}
        return {
            "grpo": (*shapes["i.i.d."], grpo),
            "grpo on trees": (*shapes["tree"], grpo),
            "treepo": shapes["tree"],
            f"treepo, {queries['tree']} queries": more["tree"],
            f"spread, {queries['spread']} queries": more["spread"],
            f"grpo, {leaves} leaves, {queries['half']} queries": (*more["half"], grpo),
            f"narrow, {leaves} leaves, {queries['narrow']} queries": more["narrow"],
        }

    def cells(self, config: Config, done: Results) -> list[Cell]:
        sweep_seeds = range(SWEEP_SEED, SWEEP_SEED + self.sweep_seeds)
        cells = starting_cells(config, [*sweep_seeds, *range(self.seeds)])
        if not all(cell in done for cell in cells):
            return cells
        start = from_start(config, SWEEP_SEED, done)
        cells += [
            Cell(shape, SWEEP_SEED, (*start, *overrides), stage=TOKENS)
            for shape, overrides in self.shapes(config).items()
        ]
        if not all(cell in done for cell in cells):
            return cells
        arms = self.arms_at(config, self.queries(config, done))
        if len(self.rates) > 1:
            cells += [
                Cell(
                    f"{arm}, rate x{rate:g}",
                    seed,
                    (*from_start(config, seed, done), *overrides, _rate(config, rate)),
                    SWEEP,
                )
                for seed in sweep_seeds
                for arm, overrides in arms.items()
                for rate in self.rates
            ]
            if not all(cell in done for cell in cells):
                return cells
        return cells + [
            Cell(arm, seed, (*from_start(config, seed, done), *overrides, _rate(config, self.best_rate(arm, done))))
            for seed in range(self.seeds)
            for arm, overrides in arms.items()
        ]

    def queries(self, config: Config, done: Results) -> dict[str, int]:
        """Queries per step of each shape that generate as many tokens as those of independent answers."""
        tokens = {arm: next(iter(runs.values()))["tokens_per_query"] for arm, runs in by_arm(done, TOKENS).items()}
        independent = next(iter(tokens.values()))
        return {arm: round(config.trainer.prompts_per_step * independent / n) for arm, n in tokens.items()}

    def best_rate(self, arm: str, done: Results) -> float:
        """The rate, times `trainer.lr`, with the best mean accuracy over the runs of the sweep."""
        if len(self.rates) == 1:
            return self.rates[0]
        runs = by_arm(done, SWEEP)
        return max(
            self.rates, key=lambda rate: np.mean([_over_run(r) for r in runs[f"{arm}, rate x{rate:g}"].values()])
        )

    def measure(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        if cell.stage == TOKENS:
            return _tokens_per_query(config, self.token_problems, watch)
        if cell.stage == SWEEP:
            try:
                return train(config, folder / "run", watch)
            except TreePOError as error:  # a rate may be too high
                return {"failed": str(error)}
        return super().measure(config, cell, folder, watch)

    def findings(self, config: Config, done: Results) -> Findings:
        arms = by_arm(done)
        return Findings(
            tables=(score_table(arms), reach_table(arms), cost_table(arms), *self._sweep_table(config, done)),
            panels=curves(arms),
            notes=(
                f"At equal leaves every arm has {config.trainer.prompts_per_step} queries of {config.sampler.width} "
                "leaves a step; arms with more queries generate as many tokens a step as grpo, at the start.",
                "Differences and ratios are to the first arm, seed by seed; intervals are 95 %, Student's t.",
            ),
        )

    def _sweep_table(self, config: Config, done: Results) -> Sequence[Table]:
        if len(self.rates) == 1:
            return ()
        runs = by_arm(done, SWEEP)
        arms = self.arms_at(config, self.queries(config, done))
        rows: list[list[Value]] = [
            [
                arm,
                *(
                    float(np.mean([_over_run(r) for r in runs[f"{arm}, rate x{rate:g}"].values()]))
                    for rate in self.rates
                ),
                f"x{self.best_rate(arm, done):g}",
            ]
            for arm in arms
        ]
        title = f"mean pass@1 over the runs of the sweep, by rate (times {config.trainer.lr:g})"
        return [Table(title, ("arm", *(f"x{rate:g}" for rate in self.rates), "chosen"), rows)]


def _rate(config: Config, factor: float) -> str:
    return f"trainer.lr={config.trainer.lr * factor!r}"


def _over_run(result: Result) -> float:
    """Mean accuracy after the start; 0 for a run that failed."""
    return 0.0 if "failed" in result else float(np.mean([p[SCORE] for p in result["curve"][1:]]))


def _tokens_per_query(config: Config, problems: int, watch: Watch) -> Result:
    with build_actor(config) as actor:
        chosen = actor.task.problems("train")[:problems]
        rollouts = actor.rollouts(
            [(f"tokens/{p}", problem) for p, problem in enumerate(chosen)],
            config.sampler,
            config.seed,
            on_progress=lambda done, total: watch.progress(done / total),
        )
    return {
        "tokens_per_query": float(np.mean([r.tree.unique_tokens for r in rollouts])),
        "sharing": float(np.mean([r.tree.flat_tokens / r.tree.unique_tokens for r in rollouts])),
        "spread": float(np.mean([r.has_spread for r in rollouts])),
    }


SHARES = (0.5, 0.75, 0.9, 1.0)  # of the baseline's whole gain


def reach_table(arms: Arms) -> Table:
    """Tokens until an arm has made a share of the gain that the baseline makes in all, as a ratio to the baseline's.

    The gain is that of the mean curve over seeds. A seed that never gets there has no ratio; how many do is shown.
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
    return Table("generated tokens until that accuracy, over the baseline's", ("arm", *columns), rows)
