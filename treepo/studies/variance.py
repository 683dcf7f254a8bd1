"""How noisy the gradient of a way to sample and to give credit is, measured where training would start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from treepo.advantages import RLOO, AnyEstimator, TreePO, TreePOSegment
from treepo.errors import ConfigError
from treepo.evaluate import final_answers
from treepo.forest import Forest, Ints
from treepo.learner.gradient import accumulate
from treepo.learner.packing import fold, pack
from treepo.rollouts import Actor
from treepo.run.build import build_actor
from treepo.run.config import Config
from treepo.studies.statistics import Mean
from treepo.studies.study import (
    START,
    Cell,
    Findings,
    Line,
    Panel,
    Result,
    Results,
    Study,
    Table,
    Value,
    Watch,
    by_arm,
    from_start,
    starting_cells,
    starting_model,
)
from treepo.tree import ScoredTree

TRUTH = "truth"  # the stage that measures the direction that all others are compared with
UNBIASED = "leave one out"  # of independent answers: the policy gradient itself
ESTIMATORS: dict[str, AnyEstimator] = {UNBIASED: RLOO(), "treepo": TreePO(), "segment": TreePOSegment()}


class Variance(Study):
    """The noise scale of the gradient in generated tokens, by the shape of the tree and the estimator.

    A query's gradient g has a mean G over queries and rollouts, and a covariance C. A batch that generates as many
    tokens as `tokens per query * tr C / |G|^2` has a gradient with as much noise as signal (the noise scale of arXiv
    1812.06162, in tokens): a shape and an estimator with half of it learn as much from half the tokens, as long as G
    points the same way. So its cosine to the policy gradient is shown, which independent answers to other problems
    with the leave-one-out baseline estimate without bias.
    """

    title: ClassVar[str] = "Variance"
    question: ClassVar[str] = (
        "How many tokens does a gradient take, by the forks of a tree and its way to give credit? "
        "(arXiv 1812.06162, eq. 2.8)"
    )

    problems: int = Field(64, ge=2, description="Queries per arm, the first of the train split.")
    truth_problems: int = Field(256, ge=2, description="Further queries, for the direction of the policy gradient.")
    widths: list[int] = Field([], description="Responses per query; default: the configuration's, and half of it.")

    def quick(self) -> Self:
        return self.model_copy(update={"seeds": 2, "problems": 8, "truth_problems": 16})

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        width, half = config.sampler.width, config.sampler.max_depth // 2
        shapes = {
            "doubling": "divergence: 2, first_divergence: 2",
            "every second level": "divergence: 2, first_divergence: 2, every: 2",
            "spread": "divergence: spread, first_divergence: null",
            "late": f"divergence: spread, first_divergence: null, start: {half}",
        }
        ways = {"i.i.d.": ("sampler.mode=iid",)} | {
            name: ("sampler.mode=tree", f"sampler.branching={{{given}}}") for name, given in shapes.items()
        }
        return {
            f"{name}, {n} leaves": (*way, f"sampler.width={n}")
            for n in dict.fromkeys(self.widths or [width, max(2, width // 2)])
            for name, way in ways.items()
        }

    def cells(self, config: Config, done: Results) -> list[Cell]:
        first = starting_cells(config, range(self.seeds))
        if not all(cell in done for cell in first):
            return first
        truth = [
            Cell("policy gradient", seed, (*from_start(config, seed, done), "sampler.mode=iid"), TRUTH)
            for seed in range(self.seeds)
        ]
        return [*first, *truth, *super().cells(config, done)[len(first) :]]

    def measure(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        if cell.stage == START:
            return starting_model(config, folder, watch)
        first, many = (self.problems, self.truth_problems) if cell.stage == TRUTH else (0, self.problems)
        estimators = {UNBIASED: RLOO()} if cell.stage == TRUTH else ESTIMATORS
        with build_actor(config) as actor:
            chosen = actor.task.problems("train")[first : first + many]
            if len(chosen) < many:
                raise ConfigError(
                    f"study.problems {self.problems} + study.truth_problems {self.truth_problems}: the task has "
                    f"{first + len(chosen)} problems to train on"
                )
            rollouts = actor.rollouts(
                [(f"variance/{p.id}", p) for p in chosen],
                config.sampler,
                config.seed,
                on_progress=lambda done, total: watch.progress(done / total / 2, "sampling"),
            )
            found: Result = _sampled(actor, rollouts)
        for i, (name, estimator) in enumerate(estimators.items()):
            watch.progress((1 + i / len(estimators)) / 2, name)
            file = folder / f"{name.replace(' ', '-')}.safetensors"
            found[name] = moments(config, actor.model, rollouts, estimator, file)
        return found

    def findings(self, config: Config, done: Results) -> Findings:
        arms, seeds = by_arm(done), range(self.seeds)
        baseline = next(iter(arms.values()))
        (truth,) = by_arm(done, TRUTH).values()
        direction = _gradients(truth, UNBIASED)  # read once: one gradient per seed
        rows: list[list[Value]] = []
        points: dict[str, dict[str, list[tuple[float, Mean]]]] = {name: {} for name in ESTIMATORS}
        for arm, runs in arms.items():
            shape, _, leaves = arm.removesuffix(" leaves").rpartition(", ")
            for name in ESTIMATORS:
                noise = Mean.jackknife(seeds, partial(_log_noise, runs, name))
                ratio = Mean.jackknife(seeds, partial(_log_ratio, runs, name, baseline))
                cosine = Mean.jackknife(seeds, partial(_cosine, _gradients(runs, name), direction))
                rows.append([f"{arm}: {name}", noise and noise.exp(), ratio and ratio.exp(), cosine])
                if ratio:
                    points[name].setdefault(shape, []).append((float(leaves), ratio.exp()))
        panels = [
            Panel(
                "responses per query",
                f"noise scale over the first, {name}",
                tuple(Line(shape, [x for x, _ in at], [y for _, y in at]) for shape, at in found.items()),
                log_x=True,
            )
            for name, found in points.items()
        ]
        counts = {
            "tokens per query": "tokens",
            "sharing": "sharing",
            "queries with spread": "spread",
            "distinct answers": "answers",
        }
        sampled: list[list[Value]] = [
            [arm, *(Mean.of([r[key] for r in runs.values()]) for key in counts.values())] for arm, runs in arms.items()
        ]
        return Findings(
            tables=(
                Table(
                    "noise scale of the gradient",
                    ("arm: estimator", "tokens", "over the first", "cosine to the policy gradient"),
                    rows,
                ),
                Table("what was sampled", ("arm", *counts), sampled),
            ),
            panels=tuple(panels),
            notes=(
                "Lower is better, if the cosine stays near 1. Seeds are pooled; intervals are 95 %, by the jackknife "
                "over seeds. A dash: the signal drowns in the noise; more study.problems lift it out.",
            ),
        )


def _sampled(actor: Actor, rollouts: Sequence[ScoredTree]) -> Result:
    trees = [r.tree for r in rollouts]
    tokens = sum(tree.unique_tokens for tree in trees)
    return {
        "tokens": tokens / len(trees),
        "sharing": sum(tree.flat_tokens for tree in trees) / tokens,
        "spread": float(np.mean([r.has_spread for r in rollouts])),
        "answers": float(np.mean([len(set(group) - {None}) for group in final_answers(actor, rollouts)])),
    }


def moments(
    config: Config, model: PreTrainedModel, rollouts: Sequence[ScoredTree], estimator: AnyEstimator, file: Path
) -> dict[str, float | str]:
    """The mean of the gradients of `rollouts`, saved in `file`.

    With it unbiased estimates of the square of the true mean's length, and of the trace of their covariance.
    """
    forest = Forest.of(rollouts)
    folded = fold(forest, estimator(forest), config.loss.shared_tokens)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    squares = 0.0
    for t in range(len(rollouts)):
        batch = pack(rollouts, forest, folded, [t])
        if not np.any(batch.adv_pos) and not np.any(batch.adv_neg):
            continue  # a gradient of zero
        advantage = torch.as_tensor(batch.adv_pos + batch.adv_neg, device=model.device)

        # On-policy the clipped loss has this gradient, up to a constant that cancels in every ratio.
        def loss(rows: Ints, logprob: Tensor, _: Tensor, advantage: Tensor = advantage) -> Tensor:
            return -(advantage[torch.as_tensor(rows, device=advantage.device)] * logprob).sum()

        accumulate(
            model,
            batch,
            loss,
            max_tokens=config.trainer.max_tokens,
            temperature=config.sampler.sampling.temperature,
            plan=config.trainer.attention,
        )
        one = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        model.zero_grad(set_to_none=True)
        one = one.double().cpu()
        total += one
        squares += float(one @ one)
    n = len(rollouts)
    mean = total / n
    trace = (squares - n * float(mean @ mean)) / (n - 1)
    save_file({"mean": mean.float()}, file)
    return {"gradient": str(file.resolve()), "square": float(mean @ mean) - trace / n, "trace": trace}


Runs = Mapping[int, Result]  # by seed
Gradients = dict[int, tuple[Tensor, float]]  # by seed: the mean, and the unbiased square of the true one's length


def _log_noise(runs: Runs, estimator: str, seeds: Sequence[int]) -> float | None:
    """Log of the tokens that a batch with as much noise as signal generates; None if no signal stands out."""
    square = sum(runs[seed][estimator]["square"] for seed in seeds)
    trace = sum(runs[seed][estimator]["trace"] for seed in seeds)
    tokens = np.mean([runs[seed]["tokens"] for seed in seeds])
    return float(np.log(tokens * trace / square)) if min(square, trace) > 0 else None


def _log_ratio(runs: Runs, estimator: str, baseline: Runs, seeds: Sequence[int]) -> float | None:
    ours, theirs = _log_noise(runs, estimator, seeds), _log_noise(baseline, UNBIASED, seeds)
    return None if ours is None or theirs is None else ours - theirs


def _gradients(runs: Runs, estimator: str) -> Gradients:
    found = {seed: r[estimator] for seed, r in runs.items()}
    return {seed: (load_file(f["gradient"])["mean"].double(), f["square"]) for seed, f in found.items()}


def _cosine(ours: Gradients, theirs: Gradients, seeds: Sequence[int]) -> float | None:
    """Between true mean gradients, of which both are independent estimates."""
    product = sum(float(ours[seed][0] @ theirs[seed][0]) for seed in seeds)
    squares = [sum(gradients[seed][1] for seed in seeds) for gradients in (ours, theirs)]
    return product / (squares[0] * squares[1]) ** 0.5 if min(squares) > 0 else None
