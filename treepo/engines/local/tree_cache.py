"""Key-values that outlive the slots: what a tree keeps of its segments, and how trees share a limited memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from treepo.tree import ROOT, Tree


@dataclass(slots=True)
class Block:
    """Key-values of one segment (or the prompt) of a tree."""

    begin: int
    kv: Tensor  # [layers, 2, K, t, d]: positions begin to begin + t

    @property
    def tokens(self) -> int:
        return self.kv.shape[3]

    def read(self, begin: int, end: int) -> Tensor:
        """The part [layers, 2, K, end - begin, d] at positions `begin` to `end`."""
        return self.kv[:, :, :, begin - self.begin : end - self.begin]


@dataclass(slots=True)
class Span:
    """Positions `begin` to `end` of a path, whose key-values are in the block of `seed` (None: the prompt's)."""

    seed: int | None
    begin: int
    end: int


class Kept:
    """The key-values of one tree's prompt and of every segment that has ended, each once, under its seed.

    Also what memory they take: `held` is how many tokens each block has, or will have at most when its row ends.
    """

    def __init__(self, tree: Tree, most: int) -> None:
        self._tree = tree
        self.most = most  # tokens ever
        self.blocks: dict[int | None, Block] = {}
        self.held: dict[int | None, int] = {}

    def spans(self, node: int) -> list[Span]:
        """Where the key-values of the path to `node` are, all but its last token's."""
        spans: list[Span] = []
        for index in self._tree.path(node):
            segment = self._tree.nodes[index]
            seed = None if index == ROOT else segment.seed
            begin, end = max(segment.start - 1, 0), segment.start + len(segment.tokens) - 1
            if spans and spans[-1].seed == seed:
                spans[-1].end = end  # halves of one segment
            elif begin < end:
                spans.append(Span(seed, begin, end))
        return spans

    def missing(self, spans: Sequence[Span]) -> list[Span]:
        """Those that no block covers: the prompt at first, and what another engine has sampled."""
        return [
            s
            for s in spans
            if s.seed not in self.blocks or self.blocks[s.seed].begin + self.blocks[s.seed].tokens < s.end
        ]

    def read(self, spans: Sequence[Span], begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """The key-values of positions `begin` to `end` of a path: pieces, and the position of each."""
        for span in spans:
            first, last = max(span.begin, begin), min(span.end, end)
            if first < last:
                yield first, self.blocks[span.seed].read(first, last)

    def wanted(self, spans: Sequence[Span], seed: int, max_tokens: int) -> dict[int | None, int]:
        """What `held` gains when a row joins that goes on after `spans`."""
        longer = {s.seed: s.end - s.begin for s in spans if self.held.get(s.seed, 0) < s.end - s.begin}
        return {**longer, seed: max_tokens}

    def settle(self, seed: int) -> None:
        """Bring `held` up to date after the row of `seed` has ended, however it did."""
        self.held.pop(seed, None)
        if seed in self.blocks:
            self.held[seed] = self.blocks[seed].tokens


class Budget:
    """Shares `tokens` of key-values among trees so that none is ever given up, computed again, or waits for ever.

    The banker's algorithm (Dijkstra, 1965) in the order of age: each tree says at the outset how many tokens it holds
    at most, and may take more while every older one could still take its most if the younger ones stayed as they are.
    So the oldest never waits; it ends, and frees what it has for the next.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def slack(self, trees: Sequence[Kept]) -> dict[Kept, int]:
        """Tokens that each of `trees`, from the oldest to the youngest, may take now."""
        held = np.array([sum(tree.held.values()) for tree in trees], np.int64)
        most = np.array([tree.most for tree in trees], np.int64)
        younger = held[::-1].cumsum()[::-1] - held  # what those after each have
        spare = np.minimum.accumulate(self.tokens - most - younger)  # all from the oldest to each can do without
        allowed = most - held
        allowed[1:] = np.minimum(allowed[1:], spare[:-1])
        return dict(zip(trees, allowed.tolist(), strict=True))
