"""SPO-tree: each segment is credited with what it gains over the one before, in mean reward."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.advantages.estimator import Estimator
from treepo.advantages.node_values import at_parent, children, mean_over_children, over_parent, spread_of_children
from treepo.forest import Bools, Floats, Forest


class SPO(Estimator):
    """Gain in value of each segment over the one before; a leaf is worth its reward, a node the mean over its children.

    `scale="none"` is SPO-tree, arXiv 2505.23564. `siblings` divides a gain by (std of the values among the siblings +
    1e-8), an option of SPO's code and, up to the 1e-8, the advantage of TreeRPO, arXiv 2506.05183. `values` is what
    the code released with arXiv 2508.17445 calls SPO, and not the same: values are z-scored among siblings *first* (0
    where they are all equal), and the gain is the difference of two z-scores, each of another group; a segment without
    siblings keeps its raw value, a root has 0. Ours: 0 too for segments that all leaves of the query share, so that a
    lone leaf gets 0 (there its raw reward). Standard deviations are the biased ones.

    SPO trains a segment once, however many leaves share it: set `loss.shared_tokens=mean`. It also drops segments
    without gain from the batch. Here they stay: they have no gradient, but count in the token mean.
    """

    kind: Literal["spo"] = "spo"
    scale: Literal["none", "siblings", "values"] = Field(
        "none", description="Divide gains by the std among siblings, or z-score values among siblings before (values)."
    )

    def values(self, forest: Forest) -> Floats:
        value = mean_over_children(forest, forest.rewards)  # [N]
        gain = value - at_parent(forest, value)  # [N]
        std = at_parent(forest, spread_of_children(forest, value))  # [N] among a node and its siblings
        if self.scale == "values":
            scored = np.where(at_parent(forest, children(forest)) > 1, gain / np.maximum(std, 1e-8), value)
            scored[_shared_by_all(forest)] = 0.0
            own, before = over_parent(forest, scored)
            advantage = own - before
        else:
            # Of a cut segment, the first part has the siblings.
            advantage = over_parent(forest, gain / (std + 1e-8) if self.scale == "siblings" else gain)[0]
        return np.where(forest.path >= 0, advantage, 0.0)


def _shared_by_all(forest: Forest) -> Bools:
    """[N] whether all leaves of the query are below the node; so it is for the root."""
    count = forest.leaf_count
    shared: Bools = count == np.repeat(count[forest.first_node[:-1]], np.diff(forest.first_node))
    return shared
