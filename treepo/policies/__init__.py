"""The three decisions that shape a tree. Each is a frozen model whose fields are its settings and whose call decides.

Randomness comes only from the generator that the sampler hands in, which is keyed by the place in the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from treepo.tree import Tree


@dataclass(frozen=True, slots=True)
class Frontier:
    """A tree between two levels: what is known when children are to be given out."""

    tree: Tree
    active: Sequence[int]  # unfinished nodes, all of the last level; before the first level, the root alone
    finished: Sequence[int]  # leaves, in the order in which they ended
    finished_now: int  # how many of them ended on the last level
    width: int  # leaves that the tree should have
    levels: int  # most segments on a path
    progress: float  # part of the training that is done, 0 to 1
    rng: Random

    @property
    def remaining(self) -> int:
        """Leaves still owed, those that the active paths will become included."""
        return self.width - len(self.finished)

    def longest(self, leaf: int) -> int:
        """Most response tokens that can be kept of the path to `leaf` so that another segment may follow.

        At least one is cut, and what is kept has fewer than `levels` segments.
        """
        tree, node = self.tree, leaf
        while tree.nodes[node].depth >= self.levels:
            node = tree.nodes[node].parent
        return max(0, min(tree.response_length(node), tree.response_length(leaf) - 1))
