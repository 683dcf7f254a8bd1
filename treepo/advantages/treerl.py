"""TreeRL and AttnRL: a segment is credited with its gain over the prompt (global) and over its parent (local)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from treepo.advantages.estimator import Estimator
from treepo.advantages.node_values import mean_over_leaves, over_parent
from treepo.forest import Floats, Forest


class TreeRL(Estimator):
    """(V - V of the parent) + V, where V is the mean over the leaves below of reward - mean of the query's others.

    Source: arXiv 2506.11902, which also divides by the root of the number of leaves through a segment: set
    `loss.shared_tokens=sqrt`. Its code can besides subtract a mean over all segments of the tree, weighted by leaves or
    by tokens, which the formula does not have; not here. It trains on a part of the leaves only (all count in V).
    """

    kind: Literal["treerl"] = "treerl"

    def values(self, forest: Forest) -> Floats:
        others = np.maximum(forest.leaf_count[forest.path[:, :1]] - 1, 1)  # [L, 1]
        # R - mean of the others = (R - mean) (others + 1) / others, and both are linear in R.
        advantage: Floats = _global_and_local(forest) * (others + 1) / others
        return advantage


class AttnRL(Estimator):
    """(V - V of the root) + (V - V of the parent), where V is the mean reward of the leaves below.

    Source: arXiv 2509.26628, which also divides by the root of the number of leaves through a segment: set
    `loss.shared_tokens=sqrt`. With n leaves in a query, it is (n - 1) / n of TreeRL's.
    """

    kind: Literal["attnrl"] = "attnrl"

    def values(self, forest: Forest) -> Floats:
        return _global_and_local(forest)


def _global_and_local(forest: Forest) -> Floats:
    own, before = over_parent(forest, mean_over_leaves(forest, forest.rewards))
    return np.where(forest.path >= 0, (own - own[:, :1]) + (own - before), 0.0)
