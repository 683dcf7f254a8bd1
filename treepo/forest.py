"""Many trees as flat arrays, so that advantages and packing are a few numpy calls, whatever the number of trees."""

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
    """N nodes of all trees, L leaves with a known reward, paths of at most D + 1 nodes (root first).

    Node n of tree t has the index `first_node[t] + n`. Leaves without a reward have no row: they take part in
    no group and are not trained on.
    """

    trees: tuple[ScoredTree, ...]  # where its nodes are from, in order
    first_node: Ints  # [trees + 1]
    parent: Ints  # [N] node index; -1 for roots
    length: Ints  # [N] tokens that the policy sampled in the node; 0 for roots and for what tools have added
    lower: Bools  # [N] whether it is the lower part of a segment that was split (`Tree.split`); its parent is the upper
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
        segments = np.fromiter((node.depth for node in nodes), np.int64, len(nodes))  # a split makes no path deeper
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
        """[N] sums of `values` [L, D + 1] over the leaves below each node (zero where there is none)."""
        on_path = self.path >= 0
        return np.bincount(self.path[on_path], values[on_path], len(self.length)).astype(np.float64)

    @property
    def leaf_count(self) -> Floats:
        """[N] leaves below each node."""
        return self.over_leaves(np.ones(self.path.shape))

    @property
    def same_segment(self) -> Bools:
        """[N] whether a node and its parent are one segment that was split, and no scored leaf hangs between them."""
        count = self.leaf_count
        same: Bools = self.lower & (count == count[self.parent])
        return same


def _paths(leaf: Ints, parent: Ints) -> tuple[Ints, Ints]:
    """Depths [L] and root-first paths [L, D + 1]: climb from all leaves at once, then turn each row round."""
    climbing, node = [leaf], leaf
    while (node := np.where(node >= 0, parent[node], -1)).max(initial=-1) >= 0:
        climbing.append(node)
    upward = np.stack(climbing, axis=1)  # [L, D + 1] leaf first
    depth = (upward >= 0).sum(axis=1) - 1
    column = depth[:, None] - np.arange(upward.shape[1])[None, :]
    path = np.take_along_axis(upward, np.maximum(column, 0), axis=1)
    return depth, np.where(column >= 0, path, -1)
