"""How noisy the gradient is, by the shape of the tree and the advantage estimator, where training would start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from treepo.learner.gradient import backward_row
from treepo.learner.packing import fold, pack_row
from treepo.rollouts import Actor
from treepo.run.build import build_actor
from treepo.run.config import Config
from treepo.studies.findings import Curve, Findings, Plot, Result, ResultTable, Value, means_table
from treepo.studies.statistics import Mean
from treepo.studies.study import Cell, Results, Study, Watch, by_arm, from_start, sample_trees, starting_cells
from treepo.tree import ScoredTree

TRUTH = "truth"  # the stage that measures the direction that all others are compared with
UNBIASED = "leave one out"  # with independent responses it estimates the policy gradient itself
ESTIMATORS: dict[str, AnyEstimator] = {UNBIASED: RLOO(), "treepo": TreePO(), "segment": TreePOSegment()}


class VarianceStudy(Study):
    """Measures the noise scale of the gradient, in generated tokens, by the shape of the tree and the estimator.

    The gradient g of one prompt has a mean G over prompts and rollouts, and a covariance C. The noise scale is
    `tokens per prompt * tr C / |G|^2` (arXiv 1812.06162, in tokens): a batch that generates this many tokens has a
    gradient with as much noise as signal. A shape and an estimator with half the noise scale learn as much from half
    the tokens, as long as their G has the same direction. The study therefore shows the cosine of G to the policy
    gradient. The policy gradient is estimated without bias, from independent responses to other problems with the
    leave-one-out baseline.
    """

    title: ClassVar[str] = "Variance"
    question: ClassVar[str] = (
        "How many tokens does a good gradient need, by the forks of a tree and the advantage estimator? "
        "(arXiv 1812.06162, eq. 2.8)"
    )

    problems: int = Field(64, ge=2, description="Problems per arm, the first of the train split.")
    truth_problems: int = Field(256, ge=2, description="Further problems, for the direction of the policy gradient.")
    widths: list[int] = Field([], description="Responses per prompt. Default: the configuration's, and half of it.")

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

    def stages(self, config: Config, done: Results) -> Iterator[list[Cell]]:
        yield starting_cells(config, range(self.seeds))
        truth = [
            Cell("policy gradient", seed, (*from_start(config, seed, done), "sampler.mode=iid"), TRUTH)
            for seed in range(self.seeds)
        ]
        yield [*truth, *self.main_cells(config, done)]

    def measure_arm(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        first, many = (self.problems, self.truth_problems) if cell.stage == TRUTH else (0, self.problems)
        estimators = {UNBIASED: RLOO()} if cell.stage == TRUTH else ESTIMATORS
        with build_actor(config) as actor:
            chosen = actor.task.problems("train")[first : first + many]
            if len(chosen) < many:
                raise ConfigError(
                    f"study.problems {self.problems} + study.truth_problems {self.truth_problems}: the task has "
                    f"{first + len(chosen)} problems to train on"
                )
            scored = sample_trees(
                actor,
                config,
                {f"variance/{p.id}": p for p in chosen},
                lambda done, total: watch.progress(done / total / 2, "sampling"),
            )
            found: Result = _sampled(actor, scored)
        for i, (name, estimator) in enumerate(estimators.items()):
            watch.progress((1 + i / len(estimators)) / 2, name)
            file = folder / f"{name.replace(' ', '-')}.safetensors"
            found[name] = moments(config, actor.model, scored, estimator, file)
        return found

    def findings(self, config: Config, done: Results) -> Findings:
        arms, seeds = by_arm(done), range(self.seeds)
        baseline = next(iter(arms.values()))
        (truth,) = by_arm(done, TRUTH).values()
        direction = _gradients(truth, UNBIASED)  # here, so that the files are read once
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
        plots = [
            Plot(
                "responses per prompt",
                f"noise scale over the first arm's, {name}",
                tuple(Curve(shape, [x for x, _ in at], [y for _, y in at]) for shape, at in found.items()),
                log_x=True,
            )
            for name, found in points.items()
        ]
        counts = {
            "tokens per prompt": "tokens",
            "sharing": "sharing",
            "prompts with spread": "spread",
            "distinct answers": "answers",
        }
        columns = ("arm: estimator", "tokens", "over the first arm's", "cosine to the policy gradient")
        return Findings(
            (ResultTable("noise scale of the gradient", columns, rows), means_table("sampled trees", arms, counts)),
            tuple(plots),
            (
                "A lower noise scale is better, if the cosine stays near 1. Seeds are pooled; the intervals are 95 %, "
                "by the jackknife over seeds. A dash means that the noise hides the signal: more study.problems help.",
            ),
        )


def _sampled(actor: Actor, scored: Sequence[ScoredTree]) -> Result:
    trees = [s.tree for s in scored]
    tokens = sum(tree.unique_tokens for tree in trees)
    return {
        "tokens": tokens / len(trees),
        "sharing": sum(tree.flat_tokens for tree in trees) / tokens,
        "spread": float(np.mean([s.has_spread for s in scored])),
        "answers": float(np.mean([len(set(group) - {None}) for group in final_answers(actor, scored)])),
    }


def moments(
    config: Config, model: PreTrainedModel, scored: Sequence[ScoredTree], estimator: AnyEstimator, file: Path
) -> dict[str, float | str]:
    """Statistics of the gradients of `scored`, one gradient g per tree.

    `gradient`: the file with the mean of g. `square`: an unbiased estimate of |G|^2, the squared length of the
    expected gradient. `trace`: an unbiased estimate of tr C, the trace of the covariance of g.
    """
    forest = Forest.of(scored)
    folded = fold(forest, estimator(forest), config.loss.shared_tokens)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    squares = 0.0
    for t in range(len(scored)):
        batch = pack_row(forest, folded, [t])
        if not np.any(batch.adv_pos) and not np.any(batch.adv_neg):
            continue  # a gradient of zero
        advantage = torch.as_tensor(batch.adv_pos + batch.adv_neg, device=model.device)

        # On-policy, the clipped loss has this gradient up to a constant factor, which cancels in every ratio.
        def loss(rows: Ints, logprob: Tensor, _: Tensor, advantage: Tensor = advantage) -> Tensor:
            return -(advantage[torch.as_tensor(rows, device=advantage.device)] * logprob).sum()

        backward_row(
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
    n = len(scored)
    mean = total / n
    trace = (squares - n * float(mean @ mean)) / (n - 1)
    save_file({"mean": mean.float()}, file)
    return {"gradient": str(file.resolve()), "square": float(mean @ mean) - trace / n, "trace": trace}


Runs = Mapping[int, Result]  # by seed
Gradients = dict[int, tuple[Tensor, float]]  # by seed: the mean gradient, and the unbiased estimate of |G|^2


def _log_noise(runs: Runs, estimator: str, seeds: Sequence[int]) -> float | None:
    """Log of the noise scale in tokens. None if the noise hides the signal: an estimate is not positive."""
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
    """The cosine between two expected gradients, from independent estimates of them. None as for `_log_noise`."""
    product = sum(float(ours[seed][0] @ theirs[seed][0]) for seed in seeds)
    squares = [sum(gradients[seed][1] for seed in seeds) for gradients in (ours, theirs)]
    return product / (squares[0] * squares[1]) ** 0.5 if min(squares) > 0 else None
