"""TreeRL and AttnRL: the advantage of a segment is its gain over the prompt (global) + that over its parent (local)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from treepo.advantages.estimator import Estimator
from treepo.advantages.node_values import mean_over_leaves, over_parent
from treepo.forest import Floats, Forest


class TreeRL(Estimator):
    """(V - V of the parent) + V, with V = mean over the leaves below of (reward - mean of the tree's other leaves).

    Source: arXiv 2506.11902. The paper also divides by the square root of the number of leaves through a segment: set
    `loss.shared_tokens=sqrt`. Two things of its code are not here: an option that subtracts a mean over all segments of
    the tree, weighted by leaves or tokens, and training on only a part of the leaves (all of them count in V).
    """

    kind: Literal["treerl"] = "treerl"

    def values(self, forest: Forest) -> Floats:
        others = np.maximum(forest.leaf_count[forest.path[:, :1]] - 1, 1)  # [L, 1]
        # reward - mean of the others = (reward - mean) (others + 1) / others. V is linear in it.
        advantage: Floats = _global_and_local(forest) * (others + 1) / others
        return advantage


class AttnRL(Estimator):
    """(V - V of the root) + (V - V of the parent), where V is the mean reward of the leaves below.

    Source: arXiv 2509.26628. The paper also divides by the square root of the number of leaves through a segment: set
    `loss.shared_tokens=sqrt`. For a tree of n leaves, it is (n - 1) / n times TreeRL's advantage.
    """

    kind: Literal["attnrl"] = "attnrl"

    def values(self, forest: Forest) -> Floats:
        return _global_and_local(forest)


def _global_and_local(forest: Forest) -> Floats:
    own, before = over_parent(forest, mean_over_leaves(forest, forest.rewards))
    return np.where(forest.path >= 0, (own - own[:, :1]) + (own - before), 0.0)
