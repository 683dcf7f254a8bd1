"""An engine whose segments are a pure function of prefix and seed: for tests, examples and benchmarks of our code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from random import Random

from treepo.engines import Sampling, Segment
from treepo.errors import EngineError
from treepo.seeds import generator
from treepo.tree import Tree

Reply = Callable[[Sequence[int], int, int], Sequence[int]]
"""(prefix, max_tokens, seed) -> tokens; the engine drops those after `max_tokens` and those after a stop id."""


def random_reply(vocabulary: int) -> Reply:
    """Uniformly drawn token ids below `vocabulary`."""

    def reply(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        rng = generator(seed, len(prefix))
        return [rng.randrange(vocabulary) for _ in range(max_tokens)]

    return reply


class ScriptedEngine:
    """Answers every request with `reply`, and on demand out of order or with failures.

    `shuffle`: the seed of random delays, by which later requests may be answered before earlier ones; None: no delays.
    `failure_rate`: the probability that a request fails, drawn from its seed and the number of the attempt.
    """

    tree_tokens = 1 << 60

    def __init__(
        self,
        reply: Reply,
        *,
        context: int = 1 << 30,
        granularity: int = 1,
        shuffle: int | None = None,
        failure_rate: float = 0.0,
    ) -> None:
        self.reply = reply
        self.context = context
        self.granularity = granularity
        self.failure_rate = failure_rate
        self.version = 0
        self.open_trees = 0
        self._delays = None if shuffle is None else Random(shuffle)
        self._attempts: dict[int, int] = {}

    async def start(self) -> None:
        """Does nothing: there is nothing to reach."""

    async def open(
        self,
        tree: Tree,
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None = None,
        *,
        entropies: bool = False,
    ) -> ScriptedHandle:
        """A handle for `tree`; `sampling` and `max_tokens` have no effect."""
        self.open_trees += 1
        return ScriptedHandle(self, tree, frozenset(stop_ids), entropies)

    async def load_weights(self, version: int) -> None:
        self.version = version

    async def close(self) -> None:
        """Does nothing: there is nothing to free."""

    async def _turn(self, seed: int) -> None:
        for _ in range(self._delays.randrange(8) if self._delays else 1):
            await asyncio.sleep(0)
        attempt = self._attempts[seed] = self._attempts.get(seed, 0) + 1
        if self.failure_rate and generator(seed, "failure", attempt).random() < self.failure_rate:
            raise EngineError(f"scripted failure of request {seed}, attempt {attempt}")


class ScriptedHandle:
    """One tree of a `ScriptedEngine`."""

    def __init__(self, engine: ScriptedEngine, tree: Tree, stop_ids: frozenset[int], entropies: bool) -> None:
        self.engine, self.tree, self.stop_ids, self.entropies = engine, tree, stop_ids, entropies

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        await self.engine._turn(seed)
        tokens = list(self.engine.reply(self.tree.tokens(node), max_tokens, seed))[:max_tokens]
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        # The numbers differ between segments and positions, and are the same on every call. Nothing else matters.
        numbers = [((seed >> i % 48) & 0xFFF) / 1024 for i in range(end)]
        entropies = [number / 2 for number in numbers] if self.entropies else None
        return Segment(tokens[:end], [-number for number in numbers], self.engine.version, entropies)

    def close(self) -> None:
        self.engine.open_trees -= 1
