"""Held-out evaluation: greedy and sampled pass@1, pass@k and maj@k, with bootstrap intervals over problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from pydantic import Field

from treepo.engines import Sampling
from treepo.errors import TaskError
from treepo.forest import Floats
from treepo.rollouts import Actor
from treepo.sampler import SamplerSettings
from treepo.seeds import derive
from treepo.settings import Settings
from treepo.tree import ScoredTree

DRAWS = 1000  # of every bootstrap


class EvaluateSettings(Settings):
    """How the held-out problems are answered."""

    problems: int = Field(128, ge=1, description="Test problems, the first of the split.")
    samples: int = Field(16, ge=1, description="Independent responses per problem; also the k of pass@k and maj@k.")
    sampling: Sampling = Field(Sampling(), description="Distribution of the sampled responses.")
    correct_at: float = Field(1.0, description="A response is right if its reward is at least this.")

    def shape(self, sampler: SamplerSettings) -> SamplerSettings:
        """The independent responses that are asked of each problem, as long as those of `sampler`."""
        return sampler.model_copy(update={"mode": "iid", "width": self.samples, "sampling": self.sampling})


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy can do on `problems` held-out problems with `samples` responses each."""

    problems: int
    samples: int
    greedy: Estimate  # one response at temperature 0
    pass_at_1: Estimate
    pass_at_k: Estimate
    maj_at_k: Estimate
    response_tokens: float  # mean length of a sampled response
    unscored: int  # responses without a known reward; they count as wrong

    def metrics(self) -> dict[str, float | int]:
        """Plain numbers under the names of metrics.jsonl, such as `eval/sampled/pass@1` and its `.../low`."""
        means = {
            "eval/greedy/pass@1": self.greedy,
            "eval/sampled/pass@1": self.pass_at_1,
            f"eval/sampled/pass@{self.samples}": self.pass_at_k,
            f"eval/sampled/maj@{self.samples}": self.maj_at_k,
        }
        found: dict[str, float | int] = {"eval/problems": self.problems, "eval/samples": self.samples}
        for name, estimate in means.items():
            found |= {name: estimate.mean, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
        return found | {"eval/response_tokens/mean": self.response_tokens, "eval/reward/unknown": self.unscored}


def evaluate(
    actor: Actor,
    sampler: SamplerSettings,
    settings: EvaluateSettings,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer the first test problems independently, once greedily and `samples` times at random.

    The random numbers depend on `seed` (of the run) and the problems alone, so that two policies, or one at two times,
    are compared on common draws. `sampler` gives the response budget and the stopping rule.
    """
    seed = derive(seed, "evaluate")
    problems = actor.task.problems("test")[: settings.problems]
    if not problems:
        raise TaskError("task: no test problems to evaluate on")
    keyed = [(f"test/{problem.id}", problem) for problem in problems]
    iid = settings.shape(sampler)
    one = iid.model_copy(update={"width": 1, "sampling": Sampling(temperature=0.0)})
    asked = [(f"greedy/{key}", problem) for key, problem in keyed] + keyed
    shapes = [one] * len(keyed) + [iid] * len(keyed)
    answered = actor.sample(asked, [actor.sampler(shape) for shape in shapes], seed, on_progress=on_progress).trees
    greedy, sampled = answered[: len(keyed)], answered[len(keyed) :]
    right = correct(sampled, settings.correct_at)
    lengths = [r.tree.response_length(leaf) for r in sampled for leaf in r.tree.leaves()]
    return Evaluation(
        problems=len(problems),
        samples=settings.samples,
        greedy=_estimate(correct(greedy, settings.correct_at).mean(axis=1), seed),
        pass_at_1=_estimate(right.mean(axis=1), seed),
        pass_at_k=_estimate(pass_at_k(right, settings.samples), seed),
        maj_at_k=_estimate(maj_at_k(final_answers(actor, sampled), right, settings.samples, seed), seed),
        response_tokens=float(np.mean(lengths)),
        unscored=sum(reward is None for r in sampled for reward in r.rewards),
    )


def pass_at_k(right: np.ndarray[Any, np.dtype[np.bool_]], k: int) -> Floats:
    """[P] probability that at least one of k responses, drawn without replacement from `right` [P, n], is right.

    Source: the unbiased estimator of arXiv 2107.03374.
    """
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} responses, not {n}")
    return np.array([1.0 - comb(n - c, k) / comb(n, k) for c in right.sum(axis=1).tolist()])


def maj_at_k(
    answers: Sequence[Sequence[str | None]], right: np.ndarray[Any, np.dtype[np.bool_]], k: int, seed: int
) -> Floats:
    """[P] probability that the most frequent answer among k responses is right, by 1000 draws with replacement.

    Responses without an answer do not vote; draws without any vote are wrong; a tie counts by the share of the tied
    answers that is right. Source: maj@16 of arXiv 2508.17445.
    """
    found = np.zeros(len(answers))
    for p, given in enumerate(answers):
        names = sorted({answer for answer in given if answer is not None})
        if not names:
            continue
        vote = np.array([[answer == name for name in names] for answer in given], float)  # [n, U]
        good = np.array([any(right[p, i] for i, a in enumerate(given) if a == name) for name in names])  # [U]
        drawn = np.random.default_rng([seed, p]).integers(len(given), size=(DRAWS, k))
        votes = vote[drawn].sum(axis=1)  # [DRAWS, U]
        winners = (votes == votes.max(axis=1, keepdims=True)) & (votes > 0)
        found[p] = np.mean((winners * good).sum(axis=1) / np.maximum(winners.sum(axis=1), 1))
    return found


def correct(rollouts: Sequence[ScoredTree], correct_at: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[P, leaves] whether a leaf's reward is known and at least `correct_at`; all trees have equally many leaves."""
    return np.array([[reward is not None and reward >= correct_at for reward in r.rewards] for r in rollouts])


def final_answers(actor: Actor, rollouts: Sequence[ScoredTree]) -> list[list[str | None]]:
    """What each leaf answers, per tree, as votes count it."""
    return [
        [actor.task.final_answer(actor.decode(r.tree.response(leaf))) for leaf in r.tree.leaves()] for r in rollouts
    ]


def _estimate(values: Floats, seed: int) -> Estimate:
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))
