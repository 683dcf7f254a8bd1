"""Key-values that stay after their segment has left its slot, and how several stores share a limited memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from treepo.engines.local.prefix import Span


@dataclass(slots=True)
class KVBlock:
    """Key-values of one segment, or of one prompt."""

    begin: int
    kv: Tensor  # [layers, 2, K, t, d]: positions begin to begin + t

    @property
    def tokens(self) -> int:
        """How many positions it covers."""
        return self.kv.shape[3]

    def read(self, begin: int, end: int) -> Tensor:
        """The part [layers, 2, K, end - begin, d] at positions `begin` to `end`."""
        return self.kv[:, :, :, begin - self.begin : end - self.begin]


class KVStore:
    """Key-values of one prompt and of every ended segment below it, each once, in blocks with names.

    The store also counts memory: `held` says how many tokens each block has. For a segment that is still decoded it
    says how many tokens the block will have at most.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: the most tokens that the store will ever hold."""
        self.limit = limit
        self.blocks: dict[Hashable, KVBlock] = {}
        self.held: dict[Hashable, int] = {}

    @property
    def tokens(self) -> int:
        """Tokens whose key-values are here."""
        return sum(block.tokens for block in self.blocks.values())

    @property
    def held_tokens(self) -> int:
        """Tokens that are here, and those that segments under way may still add."""
        return sum(self.held.values())

    def missing(self, spans: Sequence[Span]) -> list[Span]:
        """The spans that no block covers: the prompt's at first, and those of tokens that were not decoded here."""
        return [
            s
            for s in spans
            if s.name not in self.blocks or self.blocks[s.name].begin + self.blocks[s.name].tokens < s.end
        ]

    def read(self, spans: Sequence[Span], begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """The key-values of positions `begin` to `end` of a prefix: parts, each with its first position."""
        for span in spans:
            first, last = max(span.begin, begin), min(span.end, end)
            if first < last:
                yield first, self.blocks[span.name].read(first, last)

    def wanted(self, spans: Sequence[Span], name: Hashable, max_tokens: int) -> dict[Hashable, int]:
        """How `held` changes when the segment `name`, of up to `max_tokens` tokens, starts after `spans`."""
        longer = {s.name: s.end - s.begin for s in spans if self.held.get(s.name, 0) < s.end - s.begin}
        return {**longer, name: max_tokens}

    def settle(self, name: Hashable) -> None:
        """Bring `held` up to date after the segment `name` has ended, has failed or was cancelled."""
        self.held.pop(name, None)
        if name in self.blocks:
            self.held[name] = self.blocks[name].tokens


class MemoryBudget:
    """Shares `tokens` of key-values among stores. Nothing is ever dropped or computed again, and no store is starved.

    This is the banker's algorithm (Dijkstra, 1965) in the order of age. Each store says at the start how many tokens it
    holds at most. It may take more while every older store could still take its most, with the younger ones staying as
    they are. So the oldest store never waits. It is closed at some time, and its memory is free for the next.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def slack(self, stores: Sequence[KVStore]) -> dict[KVStore, int]:
        """Tokens that each of `stores`, from the oldest to the youngest, may take now."""
        held = np.array([store.held_tokens for store in stores], np.int64)
        most = np.array([store.limit for store in stores], np.int64)
        younger = held[::-1].cumsum()[::-1] - held  # what those after each have
        spare = np.minimum.accumulate(self.tokens - most - younger)  # what all from the oldest to each can do without
        allowed = most - held
        allowed[1:] = np.minimum(allowed[1:], spare[:-1])
        return dict(zip(stores, allowed.tolist(), strict=True))
