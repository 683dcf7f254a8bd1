"""Estimators that compare a leaf with all leaves of its query, whatever the tree: the baselines.

Every token of a leaf gets the leaf's value. A query with a single leaf has nothing to compare with and gets 0.
`TreeGRPO` looks at the tree once, to compare also with the leaves that share the first segment.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.advantages.estimator import Estimator
from treepo.forest import Floats, Forest, Ints


class GRPO(Estimator):
    """(reward - mean) / (std + 1e-6) over the query's leaves, with the unbiased std. Source: arXiv 2402.03300."""

    kind: Literal["grpo"] = "grpo"

    def values(self, forest: Forest) -> Floats:
        return _on_path(forest, _z_score(forest.rewards, forest.tree))


class DrGRPO(Estimator):
    """reward - mean over the query's leaves: GRPO without its bias towards easy and hard queries. arXiv 2503.20783."""

    kind: Literal["dr_grpo"] = "dr_grpo"

    def values(self, forest: Forest) -> Floats:
        return _on_path(forest, forest.rewards - _groups(forest.rewards, forest.tree)[1])


class RLOO(Estimator):
    """reward - mean of the query's *other* leaves, which keeps the gradient unbiased. Source: arXiv 2402.14740."""

    kind: Literal["rloo"] = "rloo"

    def values(self, forest: Forest) -> Floats:
        count, mean = _groups(forest.rewards, forest.tree)
        return _on_path(forest, (forest.rewards - mean) * count / np.maximum(count - 1, 1))


class ReinforcePP(Estimator):
    """reward - mean over the query's leaves, whitened over the batch: REINFORCE++ with baseline. arXiv 2501.03262."""

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    whiten: bool = Field(True, description="Whiten over all response tokens of the batch.")

    def values(self, forest: Forest) -> Floats:
        return _on_path(forest, forest.rewards - _groups(forest.rewards, forest.tree)[1])


class TreeGRPO(Estimator):
    """GRPO's z-score over the query's leaves + the same over the leaves of one of its trees. Source: arXiv 2509.21240.

    There a query has several trees. Here these are what hangs on each child of the root, so a tree with one leaf gets
    only the first term, and a star is GRPO. The std is that of `grpo`.
    """

    kind: Literal["tree_grpo"] = "tree_grpo"

    def values(self, forest: Forest) -> Floats:
        below_root = forest.path[:, 1] if len(forest.leaf) else forest.leaf
        return _on_path(forest, _z_score(forest.rewards, forest.tree) + _z_score(forest.rewards, below_root))


def _groups(reward: Floats, group: Ints) -> tuple[Floats, Floats]:
    """Number of leaves and mean reward of each leaf's group, both [L]."""
    count = np.bincount(group).astype(float)
    mean = np.bincount(group, reward) / np.maximum(count, 1)
    return count[group], mean[group]


def _z_score(reward: Floats, group: Ints) -> Floats:
    """[L] (reward - mean) / (std + 1e-6) in each leaf's group, with the unbiased std; 0 for a leaf on its own."""
    count, mean = _groups(reward, group)
    deviation = reward - mean
    std: Floats = np.sqrt(np.bincount(group, deviation**2)[group] / np.maximum(count - 1, 1))
    return deviation / (std + 1e-6)


def _on_path(forest: Forest, value: Floats) -> Floats:
    return np.where(forest.path >= 0, value[:, None], 0.0)
