"""Fallback policies: where a tree continues if no path is active but it has fewer leaves than its width.

A fallback never sees rewards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from random import Random
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Discriminator, Field, Tag

from treepo.policies import Frontier
from treepo.policies.branching import softmax
from treepo.settings import Settings
from treepo.tree import Stop, Tree
from treepo.user_code import Custom, kind_of, one_of

Place = tuple[int, int]
"""A leaf, and the number of response tokens to keep of its path."""


class Fallback(Protocol):
    """Chooses places on finished paths. New children start there."""

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        """At most `wanted` places `(leaf, kept)`, each after the first `kept` response tokens of the path to `leaf`.

        `kept` is 0 to `frontier.longest(leaf)`. If a place is inside a node, the node is split. With an empty list, the
        tree keeps fewer leaves than its width.
        """
        ...


class Restart(Settings):
    """Open the new children at the root."""

    kind: Literal["root"] = "root"

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        return [(frontier.finished[0], 0)]


class NoFallback(Settings):
    """No fallback: the tree keeps fewer leaves than its width."""

    kind: Literal["none"] = "none"

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        return []


class CutBack(Settings, ABC):
    """Cuts the end off finished paths, at one place on each. If no path is a candidate, continues at the root.

    The prefix of a new child is exactly the tokens that are kept. (In the released code it is the old, longer prefix.)
    At least the last token is cut, and enough tokens that another segment fits into the depth. Source: arXiv
    2508.17445, section 2.3.
    """

    candidates: Literal["ended", "answered", "any"] = Field(
        "ended",
        description="Paths that may be cut. ended: those that ended with an answer, a stop string or EOS; answered: "
        "with an answer; any: all finished ones, except after an engine error.",
    )
    order: Literal["random", "answered_first", "longest_first"] = Field(
        "random",
        description="Order in which paths are taken. answered_first: random, but answered paths have more weight.",
    )
    answered_weight: float = Field(
        4.0, gt=0, description="With answered_first: weight of an answered path; other paths have weight 1."
    )
    min_tokens: int = Field(0, ge=0, description="Paths with fewer response tokens are not cut.")

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        tree, rng = frontier.tree, frontier.rng
        leaves = [leaf for leaf in frontier.finished if self._eligible(tree, leaf)]
        if not leaves:
            return [(frontier.finished[0], 0)]
        keys = {leaf: self._key(tree, leaf, rng) for leaf in leaves}
        return [(leaf, self._place(frontier, leaf)) for leaf in sorted(leaves, key=keys.__getitem__)[:wanted]]

    @abstractmethod
    def _place(self, frontier: Frontier, leaf: int) -> int:
        """The number of response tokens to keep of the path to `leaf`."""

    def _eligible(self, tree: Tree, leaf: int) -> bool:
        allowed = {
            "ended": (Stop.ANSWER, Stop.STOP_STRING, Stop.EOS),
            "answered": (Stop.ANSWER,),
            "any": tuple(stop for stop in Stop if stop is not Stop.ERROR),
        }[self.candidates]
        return tree.nodes[leaf].stop in allowed and tree.response_length(leaf) >= self.min_tokens

    def _key(self, tree: Tree, leaf: int, rng: Random) -> tuple[float, float]:
        """Sort key: leaves with small keys are taken first."""
        if self.order == "longest_first":
            return -tree.response_length(leaf), rng.random()
        weighted = self.order == "answered_first" and tree.nodes[leaf].stop is Stop.ANSWER
        # The smallest of several exponential draws is at index i with a probability in proportion to rate i
        # (Efraimidis and Spirakis, 2006).
        return rng.expovariate(self.answered_weight if weighted else 1.0), 0.0


class SegmentBoundary(CutBack):
    """Cut at a segment boundary, drawn uniformly. The last segment is always cut. The paper's rule."""

    kind: Literal["segment"] = "segment"

    def _place(self, frontier: Frontier, leaf: int) -> int:
        tree = frontier.tree
        return tree.response_length(frontier.rng.choice(tree.path(leaf)[:-1]))


class GridBoundary(CutBack):
    """Cut at a multiple of `window` tokens, drawn uniformly, also inside a segment. The paper's misaligned fallback."""

    kind: Literal["grid"] = "grid"
    window: int = Field(ge=1, description="Tokens between two possible places.")

    def _place(self, frontier: Frontier, leaf: int) -> int:
        return self.window * frontier.rng.randint(0, frontier.longest(leaf) // self.window)


class LowestLogProb(CutBack):
    """Cut just before the token with the lowest log-prob on the path; the first one if several are equal."""

    kind: Literal["lowest_logprob"] = "lowest_logprob"

    def _place(self, frontier: Frontier, leaf: int) -> int:
        logprobs = _logprobs(frontier.tree, leaf)[: frontier.longest(leaf) + 1]
        return min(range(len(logprobs)), key=logprobs.__getitem__, default=0)


class WeightedBlock(CutBack):
    """Cut just before a block of `window` tokens, drawn with weights softmax(+-x / temperature).

    x is the block's mean log-prob; the sign is - for `prefer: low`.
    """

    kind: Literal["block"] = "block"
    window: int = Field(ge=1, description="Tokens of a block; the last block may be shorter.")
    prefer: Literal["low", "high"] = Field(
        "low", description="Which blocks are drawn more often: low or high mean log-prob."
    )
    temperature: float = Field(
        1.0, gt=0, description="Softmax temperature, in nats; a higher value gives more equal weights."
    )

    def _place(self, frontier: Frontier, leaf: int) -> int:
        logprobs = _logprobs(frontier.tree, leaf)
        starts = range(0, frontier.longest(leaf) + 1, self.window)
        sign = -1.0 if self.prefer == "low" else 1.0
        blocks = [logprobs[start : start + self.window] for start in starts]
        weights = softmax([sign * sum(block) / max(len(block), 1) for block in blocks], self.temperature)
        return frontier.rng.choices(starts, weights)[0]


class CustomFallback(Custom):
    """Your class. It needs `__call__(frontier, wanted)` as in `Fallback`."""

    calls: ClassVar[dict[str, Any]] = {"__call__": Fallback.__call__}

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        places: Any = self.made(frontier, wanted)
        if not isinstance(places, Sequence) or len(places) > wanted:
            raise self._refuse(f"returned {places!r}: it must return a list of at most {wanted} (wanted) places")
        for place in places:
            match place:
                case (int(leaf), int(kept)) if leaf in frontier.finished and 0 <= kept <= frontier.longest(leaf):
                    pass
                case _:
                    raise self._refuse(
                        f"chose the place {place!r}: it must be (leaf, kept) with leaf in frontier.finished and kept "
                        "from 0 to frontier.longest(leaf)"
                    )
        return [(leaf, kept) for leaf, kept in places]


AnyFallback = Annotated[
    Annotated[SegmentBoundary, Tag("segment")]
    | Annotated[GridBoundary, Tag("grid")]
    | Annotated[Restart, Tag("root")]
    | Annotated[LowestLogProb, Tag("lowest_logprob")]
    | Annotated[WeightedBlock, Tag("block")]
    | Annotated[NoFallback, Tag("none")]
    | Annotated[CustomFallback, Tag("custom")],
    Discriminator(kind_of("segment")),
    one_of("segment", "grid", "root", "lowest_logprob", "block", "none", default="segment"),
]


def _logprobs(tree: Tree, leaf: int) -> list[float]:
    """[response tokens] log-probs on the path to `leaf`."""
    return list(chain.from_iterable(tree.nodes[node].logprobs for node in tree.path(leaf)[1:]))
