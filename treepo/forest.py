"""Many trees as flat arrays. Advantages and packing are a few numpy calls on them, for any number of trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treepo.tree import ScoredTree

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Forest:
    """Arrays over the N nodes of all trees and the L leaves with a known reward. Paths have at most D + 1 nodes.

    Node n of tree t has the index `first_node[t] + n`. Leaves without a reward have no row: no leaf is compared with
    them, and they are not trained on.
    """

    trees: tuple[ScoredTree, ...]  # in the order of their nodes
    first_node: Ints  # [trees + 1]
    parent: Ints  # [N] node index; -1 for roots
    length: Ints  # [N] tokens that the policy sampled in the node; 0 for roots and for tool output
    lower: Bools  # [N] whether the node is the lower part of a split segment; its parent is the upper part
    leaf: Ints  # [L] node index of each leaf
    tree: Ints  # [L] index of each leaf's tree
    depth: Ints  # [L] nodes on the path below the root; >= 1
    path: Ints  # [L, D + 1] node indices from the root to the leaf, then -1
    rewards: Floats  # [L]

    @classmethod
    def of(cls, trees: Sequence[ScoredTree]) -> Forest:
        """The arrays of `trees`, in their order."""
        first_node = np.cumsum([0, *(len(scored_tree.tree) for scored_tree in trees)])
        nodes = [node for scored_tree in trees for node in scored_tree.tree.nodes]
        parent = np.fromiter((node.parent for node in nodes), np.int64, len(nodes))
        length = np.fromiter((len(node.tokens) if node.sampled else 0 for node in nodes), np.int64, len(nodes))
        offset = np.repeat(first_node[:-1], np.diff(first_node))
        parent = np.where(parent < 0, -1, parent + offset)
        length[first_node[:-1]] = 0
        segments = np.fromiter(
            (node.depth for node in nodes), np.int64, len(nodes)
        )  # a split does not change the depth
        lower = (parent >= 0) & (segments == segments[parent])
        scored = [
            (t, leaf, reward)
            for t, scored_tree in enumerate(trees)
            for leaf, reward in zip(scored_tree.tree.leaves(), scored_tree.rewards, strict=True)
            if reward is not None
        ]
        tree = np.array([t for t, _, _ in scored], np.int64)
        leaf = np.array([n for _, n, _ in scored], np.int64) + first_node[tree]
        rewards = np.array([reward for _, _, reward in scored], np.float64)
        return cls(tuple(trees), first_node, parent, length, lower, leaf, tree, *_paths(leaf, parent), rewards)

    def over_leaves(self, values: NDArray[np.float64]) -> Floats:
        """[N] the sum of `values` [L, D + 1] over the leaves at or below each node; 0 without such a leaf."""
        on_path = self.path >= 0
        return np.bincount(self.path[on_path], values[on_path], len(self.length)).astype(np.float64)

    @property
    def leaf_count(self) -> Floats:
        """[N] the number of leaves at or below each node."""
        return self.over_leaves(np.ones(self.path.shape))

    @property
    def same_segment(self) -> Bools:
        """[N] whether a node and its parent are parts of one split segment and lead to the same scored leaves."""
        count = self.leaf_count
        same: Bools = self.lower & (count == count[self.parent])
        return same


def _paths(leaf: Ints, parent: Ints) -> tuple[Ints, Ints]:
    """Depths [L], and paths [L, D + 1] from the root to the leaf."""
    # Step from all leaves to their parents until every path is at its root. Then reverse each row.
    climbing, node = [leaf], leaf
    while (node := np.where(node >= 0, parent[node], -1)).max(initial=-1) >= 0:
        climbing.append(node)
    upward = np.stack(climbing, axis=1)  # [L, D + 1] from the leaf to the root
    depth = (upward >= 0).sum(axis=1) - 1
    column = depth[:, None] - np.arange(upward.shape[1])[None, :]
    path = np.take_along_axis(upward, np.maximum(column, 0), axis=1)
    return depth, np.where(column >= 0, path, -1)
