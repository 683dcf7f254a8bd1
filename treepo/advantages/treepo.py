"""The TreePO estimator: it compares a leaf with the leaves of every sub-tree that contains it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.advantages.estimator import Estimator
from treepo.advantages.node_values import mean_over_leaves
from treepo.forest import Floats, Forest


class TreePO(Estimator):
    """Mean over a leaf's ancestors of (its reward - mean reward of the leaves below the ancestor).

    Source: arXiv 2508.17445, eq. 5 (average), 6 (`size_weighted`), 7 (`reject_flat_groups`). Ancestors with a single
    leaf below do not count, except the root. A split segment counts once if both parts have the same leaves.
    Not in the paper: `levels="fork"`, and 0 for a leaf without any group (the released code gives a lone leaf its raw
    reward).
    """

    kind: Literal["treepo"] = "treepo"
    size_weighted: bool = Field(False, description="Weight each sub-tree by its number of leaves (eq. 6).")
    reject_flat_groups: bool = Field(False, description="Ignore sub-trees whose rewards are all equal (eq. 7).")
    use_root: bool = Field(True, description="Also compare with all leaves of the tree.")
    levels: Literal["segment", "fork"] = Field(
        "segment",
        description="How often a sub-tree counts if a chain of segments without forks leads to it. segment: once per "
        "segment; fork: once.",
    )
    whiten: bool = Field(True, description="Normalise to mean 0 and variance 1 over all response tokens of the batch.")

    def values(self, forest: Forest) -> Floats:
        path, reward = forest.path, forest.rewards
        column = np.arange(path.shape[1])  # [D + 1] depth of an ancestor
        ancestor = column[None, :] < forest.depth[:, None]  # [L, D + 1] without the leaf itself
        count = forest.leaf_count  # [N]
        size = np.where(ancestor, count[path], 0.0)  # [L, D + 1] |G_j|
        mean = mean_over_leaves(forest, reward)  # [N]

        counted = ancestor & (size > 1) & ~forest.same_segment[path]
        if self.levels == "fork":  # nested groups of the same size have the same leaves
            counted[:, 1:] &= size[:, 1:] != size[:, :-1]
        if self.reject_flat_groups:
            counted &= _spread(forest)[path] > 0
        counted[:, 0] = self.use_root
        weight = np.where(counted, size if self.size_weighted else 1.0, 0.0)
        difference = reward[:, None] - mean[path]
        value: Floats = (weight * difference).sum(axis=1) / np.maximum(weight.sum(axis=1), 1.0)  # [L]
        return np.where(path >= 0, value[:, None], 0.0)


def _spread(forest: Forest) -> Floats:
    """[N] the largest minus the smallest reward at or below each node."""
    on_path = forest.path >= 0
    node = forest.path[on_path]
    reward = np.broadcast_to(forest.rewards[:, None], forest.path.shape)[on_path]
    high, low = np.full(len(forest.length), -np.inf), np.full(len(forest.length), np.inf)
    np.maximum.at(high, node, reward)
    np.minimum.at(low, node, reward)
    spread: Floats = np.maximum(high - low, 0.0)
    return spread
