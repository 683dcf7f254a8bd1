"""The segment-level variant of TreePO: each segment is credited with what it gains over the one before."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.advantages.estimator import Estimator
from treepo.advantages.node_values import first_column, mean_over_children, mean_over_leaves, over_parent
from treepo.forest import Floats, Forest


class TreePOSegment(Estimator):
    """Gain in value of each segment over the one before; values start from TreePO's size-weighted leaves.

    A leaf's value is the mean, weighted by size, of (its reward - mean reward of the leaves below) over all nodes on
    its path, the leaf itself included; a node's value is the mean over its children, a root's 0. Source: the code
    released with arXiv 2508.17445; the paper has no formula. There a flag turns on `eta` and, as here, the factor falls
    with the distance to the leaf: a segment that is followed by m more on the leaf's path is compared with eta^(m + 1)
    times its parent's value, so that leaves of different depth give a shared segment different advantages.
    """

    kind: Literal["segment"] = "segment"
    eta: float = Field(
        1.0, gt=0, le=1, description="A parent counts by eta to the power of segments left; 1: plain difference."
    )
    whiten: bool = Field(True, description="Whiten over all response tokens of the batch.")

    def values(self, forest: Forest) -> Floats:
        path = forest.path
        size = np.where(path >= 0, forest.leaf_count[path], 0.0)  # [L, D + 1]
        size[forest.same_segment[path]] = 0.0  # a cut segment counts once
        difference = forest.rewards[:, None] - mean_over_leaves(forest, forest.rewards)[path]
        leaf_value = (size * difference).sum(axis=1) / size.sum(axis=1)  # [L]
        value = mean_over_children(forest, leaf_value)  # [N]
        value[forest.first_node[:-1]] = 0.0
        own, before = over_parent(forest, value)
        return np.where(path >= 0, own - self.eta ** _segments_left(forest) * before, 0.0)


def _segments_left(forest: Forest) -> Floats:
    """[L, D + 1] segments from a node to its leaf, both included; 1 beyond the path's end."""
    begins = (first_column(forest) == np.arange(forest.path.shape[1])) & (forest.path >= 0)
    ends_at = begins.sum(axis=1, keepdims=True)
    left: Floats = (ends_at - begins.cumsum(axis=1) + 1).astype(np.float64)
    return left
