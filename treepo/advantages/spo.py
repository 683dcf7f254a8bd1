"""SPO-tree: the advantage of a segment is its value minus that of the segment before."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.advantages.estimator import Estimator
from treepo.advantages.node_values import at_parent, children, mean_over_children, over_parent, spread_of_children
from treepo.forest import Bools, Floats, Forest


class SPO(Estimator):
    """Gain: the value of each segment minus that of the segment before. Values are mean rewards.

    The value of a leaf is its reward. The value of another node is the mean over its children.

    - `scale="none"` is SPO-tree, arXiv 2505.23564.
    - `scale="siblings"` divides a gain by (std of the values among the siblings + 1e-8). It is an option of SPO's code
      and, up to the 1e-8, the advantage of TreeRPO, arXiv 2506.05183.
    - `scale="values"` is what the code released with arXiv 2508.17445 calls SPO. It z-scores values among siblings
      first (0 if all are equal), and the gain is the difference of two z-scores from different groups. A segment
      without siblings keeps its raw value, and a root has 0. Differently from that code, segments that all leaves of
      the tree share have 0, so a lone leaf gets 0 and not its raw reward.

    All standard deviations are biased. SPO trains a segment once, however many leaves share it: set
    `loss.shared_tokens=mean`. SPO also removes segments without gain from the batch. Here they stay: they have no
    gradient, but count in the token mean.
    """

    kind: Literal["spo"] = "spo"
    scale: Literal["none", "siblings", "values"] = Field(
        "none",
        description="none: plain gains; siblings: divide a gain by the std among siblings; values: z-score the values "
        "among siblings first.",
    )

    def values(self, forest: Forest) -> Floats:
        value = mean_over_children(forest, forest.rewards)  # [N]
        gain = value - at_parent(forest, value)  # [N]
        std = at_parent(forest, spread_of_children(forest, value))  # [N] over a node and its siblings
        if self.scale == "values":
            scored = np.where(at_parent(forest, children(forest)) > 1, gain / np.maximum(std, 1e-8), value)
            scored[_shared_by_all(forest)] = 0.0
            own, before = over_parent(forest, scored)
            advantage = own - before
        else:
            # If a segment was split, its upper part has the siblings.
            advantage = over_parent(forest, gain / (std + 1e-8) if self.scale == "siblings" else gain)[0]
        return np.where(forest.path >= 0, advantage, 0.0)


def _shared_by_all(forest: Forest) -> Bools:
    """[N] whether all leaves of the tree are at or below the node. True for the root."""
    count = forest.leaf_count
    shared: Bools = count == np.repeat(count[forest.first_node[:-1]], np.diff(forest.first_node))
    return shared
