"""Where and how often a tree forks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

from pydantic import Field, field_validator

from treepo.settings import Settings
from treepo.tree import Tree


class Branching(Protocol):
    """Gives out a level's budget of children."""

    def first(self, width: int, rng: Random) -> int:
        """Children of the root, 1 to `width`."""
        ...

    def __call__(
        self, tree: Tree, active: Sequence[int], finished_now: int, remaining: int, rng: Random, progress: float
    ) -> list[int]:
        """Children (at least one) of each `active` node, at most `remaining` in all.

        `finished_now` leaves were born on this level; `remaining` leaves are still owed; `progress` is the part of the
        training that is done, 0 to 1.
        """
        ...

    def again(self, remaining: int) -> int:
        """Children of a node that the tree falls back to, 1 to `remaining`."""
        ...


class Uniform(Settings):
    """Every active path gets an even share; the budget of paths that just finished goes to those alive.

    Source: arXiv 2508.17445, algorithm 1 and section 2.3. Ours: what does not divide evenly goes, one child each, to
    paths drawn at random (the released code gives all of it to the last path).
    """

    divergence: int = Field(2, ge=1, description="Children per active path and level (the paper's N or b).")
    first_divergence: int | tuple[int, int] = Field(
        (2, 8), description="Children of the root: a number, or a range [low, high] to draw from per query."
    )

    @field_validator("first_divergence")
    @classmethod
    def _sensible(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError("give a number of at least 1, or a range [low, high] with 1 <= low <= high")
        return value

    def first(self, width: int, rng: Random) -> int:
        value = self.first_divergence
        return min(width, value if isinstance(value, int) else rng.randint(*value))

    def __call__(
        self, tree: Tree, active: Sequence[int], finished_now: int, remaining: int, rng: Random, progress: float
    ) -> list[int]:
        total = max(len(active), min(remaining, self.divergence * (finished_now + len(active))))
        share, rest = divmod(total, len(active))
        extra = set(rng.sample(range(len(active)), rest))
        return [share + (i in extra) for i in range(len(active))]

    def again(self, remaining: int) -> int:
        return min(self.divergence, remaining)
