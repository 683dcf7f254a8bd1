"""Grows trees: algorithm 1 of arXiv 2508.17445, level by level inside a tree, without any barrier across trees."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, TypeVar

from pydantic import Field

from treepo.engines import Engine, Handle, Sampling, Segment
from treepo.errors import EngineError
from treepo.policies.branching import Uniform
from treepo.policies.fallback import SegmentBoundary
from treepo.policies.stopping import EarlyStop
from treepo.seeds import derive, generator
from treepo.settings import Settings
from treepo.tree import ROOT, Stop, Tree

T = TypeVar("T")
Prompt = tuple[str, Sequence[int]]
"""A key that is unique in its batch, and token ids."""


class SamplerSettings(Settings):
    """The shape of a tree and the policies that grow it."""

    mode: Literal["tree", "iid"] = Field(
        "tree", description="iid: `width` independent responses, a tree of one level, as GRPO samples them."
    )
    width: int = Field(16, ge=1, description="Leaves per tree.")
    segment_tokens: int = Field(256, ge=1, description="Most tokens decoded between two decisions.")
    max_depth: int = Field(14, ge=1, description="Most segments on a path.")
    sampling: Sampling = Sampling()
    branching: Uniform = Uniform()
    stopping: EarlyStop = EarlyStop()
    fallback: SegmentBoundary = SegmentBoundary()
    retries: int = Field(2, ge=0, description="Times that a failed request is sent again before its leaf is given up.")

    @property
    def response_tokens(self) -> int:
        """Most tokens of a response."""
        return self.segment_tokens * self.max_depth

    @property
    def tree_tokens(self) -> int:
        """Most tokens of a tree below its prompt: each is on the path of some leaf."""
        return self.width * self.response_tokens

    @property
    def level_tokens(self) -> int:
        """Most tokens decoded on one level: independent responses have a single level that is as long as they are."""
        return self.response_tokens if self.mode == "iid" else self.segment_tokens

    @property
    def levels(self) -> int:
        """Most levels of a tree."""
        return 1 if self.mode == "iid" else self.max_depth

    def first(self, rng: Random) -> int:
        """Children of the root."""
        return self.width if self.mode == "iid" else self.branching.first(self.width, rng)


@dataclass(frozen=True)
class Sampler:
    """Turns prompts into trees of exactly `width` leaves each, on any engine.

    The same seed gives the same trees, in whatever order the engine replies: every random choice is keyed by (seed, key
    of the prompt, place in the tree), and children join the tree in the order in which they were asked for.
    """

    engine: Engine
    settings: SamplerSettings
    decode: Callable[[Sequence[int]], str]  # response token ids -> text without special tokens
    stop_ids: Collection[int]
    failures: dict[tuple[str, int], str] = field(default_factory=dict)  # (key, `ERROR` leaf) -> why it was given up

    def sample(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        progress: float = 0.0,
        on_tree: Callable[[int, Tree], None] | None = None,
    ) -> list[Tree]:
        """The trees of `prompts`, in their order; `on_tree(index, tree)` is called as each one is complete."""

        async def one(index: int, key: str, prompt: Sequence[int]) -> Tree:
            tree = await self.grow(prompt, key, seed, progress)
            if on_tree:
                on_tree(index, tree)
            return tree

        async def all_trees() -> list[Tree]:
            return await together([one(i, key, prompt) for i, (key, prompt) in enumerate(prompts)])

        return asyncio.run(all_trees())

    async def grow(self, prompt: Sequence[int], key: str, seed: int, progress: float = 0.0) -> Tree:
        """One tree of exactly `width` leaves; a leaf whose requests failed again and again ends in `Stop.ERROR`."""
        settings = self.settings
        tree = Tree(prompt, key=key, seed=derive(seed, key))
        handle = await self.engine.open(tree, settings.sampling, self.stop_ids, len(tree.prompt) + settings.tree_tokens)
        try:
            plan = {ROOT: settings.first(generator(seed, key, "first"))}  # node -> children to open
            finished: list[int] = []
            level = 0
            while plan:
                level += 1
                rng = generator(seed, key, "level", level)
                born = await self._decode(handle, tree, plan)
                active = [node for node in born if tree.nodes[node].stop is None]
                leaves = [node for node in born if tree.nodes[node].stop is not None]
                finished += leaves
                remaining = settings.width - len(finished)
                if active:
                    shares = settings.branching(tree, active, len(leaves), remaining, rng, progress)
                    plan = dict(zip(active, shares, strict=True))
                else:
                    plan = self._fall_back(tree, finished, remaining, rng) if remaining else {}
        finally:
            handle.close()
        return tree

    async def _decode(self, handle: Handle, tree: Tree, plan: dict[int, int]) -> list[int]:
        """Decode a segment for every planned child; returns the new nodes, finished where they are."""
        places = [(node, len(tree.children[node]) + i) for node, children in plan.items() for i in range(children)]
        seeds = [self._seed(tree, node, ordinal) for node, ordinal in places]
        replies = await together(
            [self._request(handle, tree, node, seed) for (node, _), seed in zip(places, seeds, strict=True)]
        )
        born = []
        for (node, _), seed, reply in zip(places, seeds, replies, strict=True):
            if isinstance(reply, EngineError):
                leaf = tree.add(node, [], [], seed=seed, version=tree.nodes[node].version, stop=Stop.ERROR)
                self.failures[tree.key, leaf] = str(reply)
                born.append(leaf)
                continue
            child = tree.add(
                node, reply.tokens, reply.logprobs, seed=seed, version=reply.version, entropies=reply.entropies
            )
            if (stop := self._stop(tree, child)) is not None:
                tree.finish(child, stop)
            born.append(child)
        return born

    async def _request(self, handle: Handle, tree: Tree, node: int, seed: int) -> Segment | EngineError:
        room = self.settings.response_tokens - tree.response_length(node)
        tokens = min(self.settings.level_tokens, room)
        failure = EngineError("never asked")
        for _ in range(self.settings.retries + 1):
            try:
                return await handle.generate(node, tokens, seed)
            except EngineError as error:
                failure = error
        return failure

    def _stop(self, tree: Tree, node: int) -> Stop | None:
        settings = self.settings
        return settings.stopping(
            lambda: self.decode(tree.response(node)),
            eos=tree.nodes[node].tokens[-1] in self.stop_ids,
            length=tree.response_length(node) >= settings.response_tokens,
            depth=tree.nodes[node].depth >= settings.levels,
        )

    def _fall_back(self, tree: Tree, finished: Sequence[int], remaining: int, rng: Random) -> dict[int, int]:
        branching, plan = self.settings.branching, Counter[int]()
        wanted = -(-remaining // branching.again(remaining))
        for leaf, kept in self.settings.fallback(tree, finished, wanted, rng):
            children = branching.again(remaining)
            plan[tree.cut(leaf, kept)] += children
            remaining -= children
        return dict(plan)

    @staticmethod
    def _seed(tree: Tree, node: int, ordinal: int) -> int:
        # The halves of a split node share a seed, hence the position; a node may be forked again, hence the ordinal.
        parent = tree.nodes[node]
        return derive(parent.seed, parent.start + len(parent.tokens), ordinal)


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of `calls` in their order; if one raises, the others are cancelled and awaited first."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        unfinished = [task for task in tasks if not task.done()]
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.gather(*unfinished, return_exceptions=True)
