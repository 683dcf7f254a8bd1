"""What requests have in common: a tree per prompt, whose key-values stay for the next request that begins alike.

Requests are independent of each other and carry their whole prefix, yet the local engine wants trees. So each request
is looked up: it belongs to the tree whose prompt it begins with, below the node with which it has most in common. What
the tree does not hold yet joins it, as does the reply.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from treepo.engines import Sampling, Segment
from treepo.engines.local.engine import LocalEngine, LocalHandle
from treepo.tree import ROOT, Tree


@dataclass(slots=True, eq=False)
class _Open:
    tree: Tree
    handle: LocalHandle
    tokens: int  # in the tree, prompt included, each counted once
    used: int = 0  # when it was last, in requests
    running: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A segment, and how much of its prefix was there already."""

    segment: Segment
    cached_tokens: int
    weights: str  # what those were called that sampled it


class NotLoadedError(Exception):
    """A request wants an adapter that is not there, or none where one is."""


class Prefixes:
    """Answers requests on `engine`, and keeps at most `tokens` tokens of key-values that no request under way needs.

    The least recently used trees go first. Requests under way are never given up for want of room.
    """

    def __init__(self, engine: LocalEngine, tokens: int) -> None:
        self.engine, self.tokens = engine, tokens
        self.adapter: str | None = None  # the one that the model has
        self._base = "default"  # what the other weights are called, by whoever sent them
        self.running = 0
        self.kept = 0
        self._trees: dict[tuple[int, ...], _Open] = {}  # by prompt
        self._lengths: Counter[int] = Counter()  # of the prompts
        self._clock, self._names = count(1), count(1)
        self._free, self._idle = asyncio.Event(), asyncio.Event()
        self._free.set()  # no update is under way
        self._idle.set()  # no request is under way
        self._updates = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._trees)

    @property
    def weights(self) -> str:
        """What the weights are called that are decoded with."""
        return self.adapter or self._base

    async def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        adapter: str | None = None,
    ) -> Answer:
        """Continue `ids`; raises `EngineError`, or `NotLoadedError`. Cancelling the call frees its slot."""
        while not self._free.is_set():
            await self._free.wait()
        if adapter != self.adapter:
            wanted = "The base model" if adapter is None else f"The model `{adapter}`"
            served = "without an adapter" if self.adapter is None else f"with the adapter `{self.adapter}` alone"
            raise NotLoadedError(f"{wanted} does not exist: what is served is the base model {served}.")
        self.running += 1
        self._idle.clear()
        try:
            found, node, known = await self._place(ids)
            found.running += 1
            found.used = next(self._clock)
            name = next(self._names)
            try:
                segment = await found.handle.generate(
                    node, max_tokens, seed, name=name, sampling=sampling, stop_ids=stop_ids
                )
                self._grow(found, node, segment.tokens, segment.logprobs, name)
                return Answer(segment, known, self.weights)
            finally:
                found.running -= 1
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()
            self._evict(self.tokens)

    def flush(self) -> None:
        """Forget all that no request under way needs."""
        self._evict(0)

    async def update(self, weights: str | None, load: Callable[[], None], adapter: str | None = None) -> None:
        """Have `load` change the weights to those called `weights` (None: as ever), or give them another `adapter`.

        That is once all requests under way are answered; later ones wait until it is done.
        """
        async with self._updates:
            self._free.clear()
            try:
                await self._idle.wait()
                self.flush()
                self.adapter = None  # also if `load` fails
                load()
                self._base, self.adapter = weights or self._base, adapter
                await self.engine.load_weights(self.engine.version + 1)
            finally:
                self._free.set()

    async def _place(self, ids: Sequence[int]) -> tuple[_Open, int, int]:
        """The tree of `ids`, the node with which they end there, and how many of them the tree held before."""
        prompt = next((p for n in sorted(self._lengths, reverse=True) if (p := tuple(ids[:n])) in self._trees), None)
        if prompt is None:
            tree = Tree(ids)
            found = _Open(tree, await self.engine.open(tree, Sampling(), ()), 0)
            self._trees[tuple(ids)] = found
            self._lengths[len(ids)] += 1
            found.tokens = len(ids)
            self.kept += len(ids)
            return found, ROOT, 0
        found = self._trees[prompt]
        node, known = longest(found.tree, ids)
        if known < len(ids):
            rest = ids[known:]
            node = self._grow(found, node, rest, [0.0] * len(rest), next(self._names))
        return found, node, known

    def _grow(self, found: _Open, node: int, tokens: Sequence[int], logprobs: Sequence[float], name: int) -> int:
        found.tokens += len(tokens)
        self.kept += len(tokens)
        return found.tree.add(node, tokens, logprobs, seed=name)

    def _evict(self, tokens: int) -> None:
        if self.kept <= tokens:
            return
        for prompt, found in sorted(self._trees.items(), key=lambda item: item[1].used):
            if self.kept <= tokens:
                return
            if found.running:
                continue
            found.handle.close()
            del self._trees[prompt]
            self._lengths[len(prompt)] -= 1
            if not self._lengths[len(prompt)]:
                del self._lengths[len(prompt)]
            self.kept -= found.tokens


def longest(tree: Tree, ids: Sequence[int]) -> tuple[int, int]:
    """The node of `tree` whose path is the longest beginning of `ids` there is, and its length.

    The tree's prompt must be one. A node that agrees with `ids` only at first is cut there.
    """
    best = (len(tree.prompt), ROOT, 0)  # tokens in common, the node, and how many of its own are among them (0: all)
    waiting = [ROOT]
    while waiting:
        for child in tree.children[waiting.pop()]:
            node = tree.nodes[child]
            same = _common(node.tokens, ids, node.start)
            whole = same == len(node.tokens)
            if same and node.start + same > best[0]:
                best = (node.start + same, child, 0 if whole else same)
            if whole:
                waiting.append(child)
    length, last, at = best
    return (tree.split(last, at) if at else last), length


def _common(tokens: Sequence[int], ids: Sequence[int], begin: int) -> int:
    """How many of `tokens` equal those of `ids` from `begin` on."""
    if begin >= len(ids) or tokens[0] != ids[begin]:
        return 0
    same = 0
    for token, other in zip(tokens, ids[begin : begin + len(tokens)], strict=False):
        if token != other:
            break
        same += 1
    return same
