"""Where a tree grows again when it has run dry: no active path, but leaves still owed. Rewards are never consulted."""

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
"""A leaf, and how many response tokens of its path are kept."""


class Fallback(Protocol):
    """Chooses places on finished paths from which to open new children."""

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        """At most `wanted` places `(leaf, kept)`: on the path to `leaf`, after its first `kept` response tokens.

        `kept` is at most `frontier.longest(leaf)`; where it is inside a node, the node is split. No place at all: the
        tree stays with fewer leaves than it owes.
        """
        ...


class Restart(Settings):
    """Start again at the root."""

    kind: Literal["root"] = "root"

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        return [(frontier.finished[0], 0)]


class NoFallback(Settings):
    """Do not: the tree stays with fewer leaves than its width."""

    kind: Literal["none"] = "none"

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        return []


class CutBack(Settings, ABC):
    """Cuts finished paths, one place on each; starts again at the root where none of them is a candidate.

    The new children hang on the node that is kept, so that they are conditioned on exactly the tokens that are kept
    (the released code conditions on the old, longer prefix). At least the last token is cut, and so much that another
    segment fits into the depth. Source: arXiv 2508.17445, section 2.3.
    """

    candidates: Literal["ended", "answered", "any"] = Field(
        "ended",
        description="Paths to cut. ended: by an answer, a stop string or EOS; answered: by an answer; any: every "
        "finished one, but for those that the engine failed.",
    )
    order: Literal["random", "answered_first", "longest_first"] = Field(
        "random", description="In which they are taken; answered_first: drawn, an answered one with more weight."
    )
    answered_weight: float = Field(
        4.0, gt=0, description="With answered_first: how many times as likely an answered path is to be drawn next."
    )
    min_tokens: int = Field(0, ge=0, description="Shorter responses are no candidates.")

    def __call__(self, frontier: Frontier, wanted: int) -> list[Place]:
        tree, rng = frontier.tree, frontier.rng
        leaves = [leaf for leaf in frontier.finished if self._eligible(tree, leaf)]
        if not leaves:
            return [(frontier.finished[0], 0)]
        keys = {leaf: self._key(tree, leaf, rng) for leaf in leaves}
        return [(leaf, self._place(frontier, leaf)) for leaf in sorted(leaves, key=keys.__getitem__)[:wanted]]

    @abstractmethod
    def _place(self, frontier: Frontier, leaf: int) -> int:
        """How many response tokens of the path to `leaf` to keep."""

    def _eligible(self, tree: Tree, leaf: int) -> bool:
        allowed = {
            "ended": (Stop.ANSWER, Stop.STOP_STRING, Stop.EOS),
            "answered": (Stop.ANSWER,),
            "any": tuple(stop for stop in Stop if stop is not Stop.ERROR),
        }[self.candidates]
        return tree.nodes[leaf].stop in allowed and tree.response_length(leaf) >= self.min_tokens

    def _key(self, tree: Tree, leaf: int, rng: Random) -> tuple[float, float]:
        """Ascending keys put leaves in the order in which they are taken."""
        if self.order == "longest_first":
            return -tree.response_length(leaf), rng.random()
        weighted = self.order == "answered_first" and tree.nodes[leaf].stop is Stop.ANSWER
        # The smallest of exponential variables is a draw in proportion to their rates (Efraimidis and Spirakis, 2006).
        return rng.expovariate(self.answered_weight if weighted else 1.0), 0.0


class SegmentBoundary(CutBack):
    """A segment boundary, uniformly drawn, of each candidate; the last segment is always cut. The paper's rule."""

    kind: Literal["segment"] = "segment"

    def _place(self, frontier: Frontier, leaf: int) -> int:
        tree = frontier.tree
        return tree.response_length(frontier.rng.choice(tree.path(leaf)[:-1]))


class GridBoundary(CutBack):
    """A multiple of `window` tokens, uniformly drawn: the misaligned fallback of the paper, also inside a segment."""

    kind: Literal["grid"] = "grid"
    window: int = Field(ge=1, description="Tokens between two places.")

    def _place(self, frontier: Frontier, leaf: int) -> int:
        return self.window * frontier.rng.randint(0, frontier.longest(leaf) // self.window)


class LowestLogProb(CutBack):
    """Just before the least likely token of the path (the first of them)."""

    kind: Literal["lowest_logprob"] = "lowest_logprob"

    def _place(self, frontier: Frontier, leaf: int) -> int:
        logprobs = _logprobs(frontier.tree, leaf)[: frontier.longest(leaf) + 1]
        return min(range(len(logprobs)), key=logprobs.__getitem__, default=0)


class Block(CutBack):
    """Just before a block of `window` tokens, drawn by its mean log-prob x with weights softmax(+-x / temperature)."""

    kind: Literal["block"] = "block"
    window: int = Field(ge=1, description="Tokens of a block; the last may be shorter.")
    prefer: Literal["low", "high"] = Field("low", description="Unlikely or likely blocks.")
    temperature: float = Field(1.0, gt=0, description="Of the softmax, in nats: the higher, the more equal.")

    def _place(self, frontier: Frontier, leaf: int) -> int:
        logprobs = _logprobs(frontier.tree, leaf)
        starts = range(0, frontier.longest(leaf) + 1, self.window)
        sign = -1.0 if self.prefer == "low" else 1.0
        blocks = [logprobs[start : start + self.window] for start in starts]
        weights = softmax([sign * sum(block) / max(len(block), 1) for block in blocks], self.temperature)
        return frontier.rng.choices(starts, weights)[0]


class CustomFallback(Custom):
    """A class of yours: with `__call__(frontier, wanted)` as `Fallback` has it."""

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
                        f"chose the place {place!r}: it must be (leaf, kept), a leaf of frontier.finished and 0 to "
                        "frontier.longest(leaf) response tokens to keep of its path"
                    )
        return [(leaf, kept) for leaf, kept in places]


AnyFallback = Annotated[
    Annotated[SegmentBoundary, Tag("segment")]
    | Annotated[GridBoundary, Tag("grid")]
    | Annotated[Restart, Tag("root")]
    | Annotated[LowestLogProb, Tag("lowest_logprob")]
    | Annotated[Block, Tag("block")]
    | Annotated[NoFallback, Tag("none")]
    | Annotated[CustomFallback, Tag("custom")],
    Discriminator(kind_of("segment")),
    one_of("segment", "grid", "root", "lowest_logprob", "block", "none", default="segment"),
]


def _logprobs(tree: Tree, leaf: int) -> list[float]:
    """[tokens of the response] log-probs of the path to `leaf`."""
    return list(chain.from_iterable(tree.nodes[node].logprobs for node in tree.path(leaf)[1:]))
