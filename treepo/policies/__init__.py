"""The three policies that shape a tree: branching, stopping and fallback.

A policy is a frozen model: its fields are its settings, and its call makes the decision. All random numbers come from
the generator in the `Frontier`, which is keyed by the place in the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from treepo.tree import Tree


@dataclass(frozen=True, slots=True)
class Frontier:
    """A tree between two levels. Branching and fallback policies decide from this."""

    tree: Tree
    active: Sequence[int]  # unfinished nodes, all on the last level; before the first level, only the root
    finished: Sequence[int]  # leaves, in the order in which they finished
    finished_now: int  # number of leaves that finished on the last level
    width: int  # leaves that the tree should have
    levels: int  # most segments on a path
    progress: float  # finished share of the training, 0 to 1
    rng: Random

    @property
    def remaining(self) -> int:
        """Leaves that the tree still needs. The active paths count towards these, since each becomes at least one."""
        return self.width - len(self.finished)

    def longest(self, leaf: int) -> int:
        """Most response tokens that a fallback may keep of the path to `leaf`.

        At least one token is cut, and the kept path has fewer than `levels` segments, so another segment can follow.
        """
        tree, node = self.tree, leaf
        while tree.nodes[node].depth >= self.levels:
            node = tree.nodes[node].parent
        return max(0, min(tree.response_length(node), tree.response_length(leaf) - 1))
