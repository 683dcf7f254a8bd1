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

DRAWS = 1000  # resamples of each bootstrap


class EvaluateSettings(Settings):
    """Held-out evaluation: one greedy response and several sampled ones per test problem."""

    problems: int = Field(128, ge=1, description="Number of test problems; the first of the split are used.")
    samples: int = Field(
        16, ge=1, description="Independently sampled responses per problem; also the k of pass@k and maj@k."
    )
    sampling: Sampling = Field(Sampling(), description="Temperature, top_p and top_k of the sampled responses.")
    correct_at: float = Field(1.0, description="A response counts as right if its reward is at least this.")

    def shape(self, sampler: SamplerSettings) -> SamplerSettings:
        """`sampler` with `samples` independent responses per problem instead of a tree."""
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
    """The results on `problems` held-out problems with `samples` responses each."""

    problems: int
    samples: int
    greedy: Estimate  # one response at temperature 0
    pass_at_1: Estimate
    pass_at_k: Estimate
    maj_at_k: Estimate
    response_tokens: float  # mean length of a sampled response
    unscored: int  # responses without a known reward; they count as wrong

    def metrics(self) -> dict[str, float | int]:
        """Numbers by the names of metrics.jsonl, such as `eval/sampled/pass@1` and `eval/sampled/pass@1/low`."""
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
    """Sample one greedy response and `samples` random ones for each of the first test problems, and score them.

    The random numbers depend only on the run's `seed` and the problems, so two evaluations use the same numbers.
    `sampler` gives the response budget and the stopping rule. `on_progress(trees done, trees)` is called for every
    tree. Raises `TaskError` without test problems.
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
    lengths = [scored.tree.response_length(leaf) for scored in sampled for leaf in scored.tree.leaves()]
    return Evaluation(
        problems=len(problems),
        samples=settings.samples,
        greedy=_estimate(correct(greedy, settings.correct_at).mean(axis=1), seed),
        pass_at_1=_estimate(right.mean(axis=1), seed),
        pass_at_k=_estimate(pass_at_k(right, settings.samples), seed),
        maj_at_k=_estimate(maj_at_k(final_answers(actor, sampled), right, settings.samples, seed), seed),
        response_tokens=float(np.mean(lengths)),
        unscored=sum(reward is None for scored in sampled for reward in scored.rewards),
    )


def pass_at_k(right: np.ndarray[Any, np.dtype[np.bool_]], k: int) -> Floats:
    """[P] the probability that at least one of k responses is right, drawn without replacement from `right` [P, n].

    Source: the unbiased estimator of arXiv 2107.03374.
    """
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} responses, not {n}")
    return np.array([1.0 - comb(n - c, k) / comb(n, k) for c in right.sum(axis=1).tolist()])


def maj_at_k(
    answers: Sequence[Sequence[str | None]], right: np.ndarray[Any, np.dtype[np.bool_]], k: int, seed: int
) -> Floats:
    """[P] the probability that the most frequent answer among k responses is right, by 1000 draws with replacement.

    `answers` [P][n] and `right` [P, n] are the responses to draw from. A response without an answer has no vote, and a
    draw without a vote counts as wrong. A tie counts as the fraction of the tied answers that are right.
    Source: maj@16 of arXiv 2508.17445.
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


def correct(trees: Sequence[ScoredTree], correct_at: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[P, L] whether the reward of each leaf is known and at least `correct_at`. Every tree must have L leaves."""
    return np.array([[reward is not None and reward >= correct_at for reward in scored.rewards] for scored in trees])


def final_answers(actor: Actor, trees: Sequence[ScoredTree]) -> list[list[str | None]]:
    """[P][L] the final answer of each leaf, or None."""
    return [
        [actor.task.final_answer(actor.decode(scored.tree.response(leaf))) for leaf in scored.tree.leaves()]
        for scored in trees
    ]


def _estimate(values: Floats, seed: int) -> Estimate:
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))
