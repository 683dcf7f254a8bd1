"""The segment-level variant of TreePO: the advantage of a segment is its value minus that of the segment before."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.advantages.estimator import Estimator
from treepo.advantages.node_values import first_column, mean_over_children, mean_over_leaves, over_parent
from treepo.forest import Floats, Forest


class TreePOSegment(Estimator):
    """Value of each segment minus eta^(m + 1) times the value of the segment before it; m segments follow on the path.

    The value of a leaf is the mean of (its reward - mean reward of the leaves below the node) over all nodes of its
    path, the leaf included, weighted by the number of leaves below the node. The value of another node is the mean over
    its children, and the value of a root is 0.

    Source: the code released with arXiv 2508.17445, where a flag turns on `eta`; the paper has no formula. With
    eta < 1, leaves of different depth give different advantages to a segment that they share.
    """

    kind: Literal["segment"] = "segment"
    eta: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor on the value of the segment before, once per segment up to the leaf; 1: plain difference.",
    )
    whiten: bool = Field(True, description="Normalise to mean 0 and variance 1 over all response tokens of the batch.")

    def values(self, forest: Forest) -> Floats:
        path = forest.path
        size = np.where(path >= 0, forest.leaf_count[path], 0.0)  # [L, D + 1]
        size[forest.same_segment[path]] = 0.0  # a split segment counts once
        difference = forest.rewards[:, None] - mean_over_leaves(forest, forest.rewards)[path]
        leaf_value = (size * difference).sum(axis=1) / size.sum(axis=1)  # [L]
        value = mean_over_children(forest, leaf_value)  # [N]
        value[forest.first_node[:-1]] = 0.0
        own, before = over_parent(forest, value)
        return np.where(path >= 0, own - self.eta ** _segments_left(forest) * before, 0.0)


def _segments_left(forest: Forest) -> Floats:
    """[L, D + 1] the number of segments from a node to its leaf, both included; 1 after the end of the path."""
    begins = (first_column(forest) == np.arange(forest.path.shape[1])) & (forest.path >= 0)
    ends_at = begins.sum(axis=1, keepdims=True)
    left: Floats = (ends_at - begins.cumsum(axis=1) + 1).astype(np.float64)
    return left
