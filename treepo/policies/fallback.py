"""Where a tree grows again when it has run dry: no active path, but leaves still owed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

from treepo.settings import Settings
from treepo.tree import Stop, Tree


class Fallback(Protocol):
    """Chooses places on finished paths from which to open new children."""

    def __call__(self, tree: Tree, finished: Sequence[int], wanted: int, rng: Random) -> list[tuple[int, int]]:
        """1 to `wanted` places `(leaf, kept)`: on the path to `leaf`, after its first `kept` response tokens."""
        ...


class SegmentBoundary(Settings):
    """A segment boundary, uniformly drawn, of each well-ended path (answer or EOS), in random order; else the root.

    The last segment is always cut. Rewards are never consulted. Source: arXiv 2508.17445, section 2.3. The new children
    hang on an existing node, so that they are conditioned on exactly the tokens that are kept (the released code
    conditions on the old, longer prefix).
    """

    def __call__(self, tree: Tree, finished: Sequence[int], wanted: int, rng: Random) -> list[tuple[int, int]]:
        candidates = [leaf for leaf in finished if tree.nodes[leaf].stop in (Stop.ANSWER, Stop.EOS)]
        if not candidates:
            return [(finished[0], 0)]
        chosen = rng.sample(candidates, min(wanted, len(candidates)))
        return [(leaf, tree.response_length(rng.choice(tree.path(leaf)[:-1]))) for leaf in chosen]
