"""Baselines: estimators that compare a leaf with all leaves of its tree.

All tokens of a leaf get the same advantage. In a tree with a single leaf it is 0. Except for `TreeGRPO`, the forks of
the tree have no effect.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.advantages.estimator import Estimator
from treepo.forest import Floats, Forest, Ints


class GRPO(Estimator):
    """(reward - mean) / (std + 1e-6) over the leaves of the tree, with the unbiased std. Source: arXiv 2402.03300."""

    kind: Literal["grpo"] = "grpo"

    def values(self, forest: Forest) -> Floats:
        return _on_path(forest, _z_score(forest.rewards, forest.tree))


class DrGRPO(Estimator):
    """reward - mean over the leaves of the tree: GRPO without its bias to easy and hard problems. arXiv 2503.20783."""

    kind: Literal["dr_grpo"] = "dr_grpo"

    def values(self, forest: Forest) -> Floats:
        return _on_path(forest, forest.rewards - _groups(forest.rewards, forest.tree)[1])


class RLOO(Estimator):
    """reward - mean of the *other* leaves of the tree, so the gradient is unbiased. Source: arXiv 2402.14740."""

    kind: Literal["rloo"] = "rloo"

    def values(self, forest: Forest) -> Floats:
        count, mean = _groups(forest.rewards, forest.tree)
        return _on_path(forest, (forest.rewards - mean) * count / np.maximum(count - 1, 1))


class ReinforcePP(Estimator):
    """reward - mean over a tree's leaves, whitened over the batch: REINFORCE++ with baseline. arXiv 2501.03262."""

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    whiten: bool = Field(True, description="Normalise to mean 0 and variance 1 over all response tokens of the batch.")

    def values(self, forest: Forest) -> Floats:
        return _on_path(forest, forest.rewards - _groups(forest.rewards, forest.tree)[1])


class TreeGRPO(Estimator):
    """GRPO's z-score over all leaves of the tree + the z-score over the leaves that share the first segment.

    Source: arXiv 2509.21240. In the paper a prompt has several trees, and the second term is over one of them. Here
    each child of the root is the start of such a tree. A leaf that is alone below its child gets only the first term,
    so a tree that forks only at the root gives GRPO. The std is the unbiased one of `grpo`.
    """

    kind: Literal["tree_grpo"] = "tree_grpo"

    def values(self, forest: Forest) -> Floats:
        below_root = forest.path[:, 1] if len(forest.leaf) else forest.leaf
        return _on_path(forest, _z_score(forest.rewards, forest.tree) + _z_score(forest.rewards, below_root))


def _groups(reward: Floats, group: Ints) -> tuple[Floats, Floats]:
    """The number of leaves and the mean reward in each leaf's group, both [L]. `group` [L] has the group's number."""
    count = np.bincount(group).astype(float)
    mean = np.bincount(group, reward) / np.maximum(count, 1)
    return count[group], mean[group]


def _z_score(reward: Floats, group: Ints) -> Floats:
    """[L] (reward - mean) / (std + 1e-6) in each leaf's group, with the unbiased std; 0 in a group of one leaf."""
    count, mean = _groups(reward, group)
    deviation = reward - mean
    std: Floats = np.sqrt(np.bincount(group, deviation**2)[group] / np.maximum(count - 1, 1))
    return deviation / (std + 1e-6)


def _on_path(forest: Forest, value: Floats) -> Floats:
    return np.where(forest.path >= 0, value[:, None], 0.0)
