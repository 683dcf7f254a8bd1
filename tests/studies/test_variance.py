"""The study of gradient noise: moments against gradients taken one answer at a time, and its settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.packed_oracle import models
from tests.support.random_trees import grow_random
from tests.support.small_runs import small_config
from treepo.advantages import RLOO, TreePO
from treepo.errors import ConfigError
from treepo.run.config import Config, changed
from treepo.studies.study import Cell, Watch
from treepo.studies.variance import VarianceStudy, moments
from treepo.tree import ScoredTree


def answers(rewards: dict[int, list[float]]) -> list[ScoredTree]:
    return [ScoredTree(str(seed), grow_random(seed, leaves=6), given) for seed, given in rewards.items()]


def scored() -> list[ScoredTree]:
    trees = {seed: grow_random(seed, leaves=6) for seed in range(5)}
    return answers({s: [float((leaf + s) % 2) for leaf in range(len(t.leaves()))] for s, t in trees.items()})


def test_moments_are_those_of_gradients_taken_one_answer_at_a_time(tmp_path: Path) -> None:
    packed, plain = models("llama", torch.float64)
    trees, config = scored(), small_config(tmp_path)
    each = []
    for one in trees:
        plain.zero_grad()
        rewards = np.array(one.rewards)
        for leaf, reward in zip(one.tree.leaves(), rewards, strict=True):
            others = (rewards.sum() - reward) / max(1, len(rewards) - 1)
            prompt, response = one.tree.prompt, one.tree.response(leaf)
            ids = torch.tensor([[*prompt, *response]])
            logprob = plain(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            (-(reward - others) * logprob.sum()).backward()
        each.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    gradients = torch.stack(each)
    found = moments(config, packed, trees, RLOO(), tmp_path / "g.safetensors")
    mean = load_file(found["gradient"])["mean"].double()
    assert torch.allclose(mean, gradients.mean(0), atol=1e-5 * float(gradients.abs().max()))
    mutant = moments(config, packed, trees, TreePO(), tmp_path / "mutant.safetensors")
    other = load_file(mutant["gradient"])["mean"].double()
    assert not torch.allclose(other, gradients.mean(0), atol=1e-2 * float(gradients.abs().max()))
    trace = float(gradients.var(0).sum())
    assert found["trace"] == pytest.approx(trace, rel=1e-6)
    assert found["square"] == pytest.approx(float(gradients.mean(0).square().sum()) - trace / 5, rel=1e-6)


def test_prompts_without_spread_count_as_gradients_of_zero(tmp_path: Path) -> None:
    packed, _ = models("llama", torch.float64)
    some = scored()
    flat = [ScoredTree(r.problem_id, r.tree, [1.0] * len(r.rewards)) for r in some]
    alone, diluted = (
        moments(small_config(tmp_path), packed, given, RLOO(), tmp_path / f"{len(given)}.safetensors")
        for given in (some, some + flat)
    )
    means = [load_file(found["gradient"])["mean"] for found in (alone, diluted)]
    assert torch.allclose(means[0], 2 * means[1])
    # E |g|^2 = trace + square is halved.
    assert diluted["trace"] + diluted["square"] == pytest.approx((alone["trace"] + alone["square"]) / 2, rel=1e-6)


def test_a_study_of_gradients_wants_enough_problems(config: Config, tmp_path: Path) -> None:
    cell = Cell("policy gradient", 0, stage="truth")
    study = VarianceStudy(problems=2, truth_problems=3)
    with pytest.raises(ConfigError, match="the task has 4 problems to train on"):
        study.measure(changed(config, ["warmup.steps=1"]), cell, tmp_path, Watch())
