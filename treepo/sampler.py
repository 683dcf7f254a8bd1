"""Grows trees: algorithm 1 of arXiv 2508.17445, level by level inside a tree, without any barrier across trees."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import Field, model_validator

from treepo.engines import Engine, Handle, Sampling, Segment
from treepo.errors import EngineError
from treepo.event_loop import EventLoop
from treepo.policies import Frontier
from treepo.policies.branching import AnyBranching, LevelBudget
from treepo.policies.fallback import AnyFallback, SegmentBoundary
from treepo.policies.response_text import ResponseText
from treepo.policies.stopping import AnyStopping, EarlyStop
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
    width: int = Field(16, ge=1, description="Leaves per tree; with `token_budget`, the most.")
    token_budget: int | None = Field(
        None,
        ge=1,
        description="Response tokens per tree in place of a fixed number of leaves. A shared token counts once per "
        "leaf. The number of leaves follows from the mean length of the tree's paths so far.",
    )
    min_width: int = Field(1, ge=1, description="Fewest leaves of a tree with a `token_budget`.")
    segment_tokens: int = Field(256, ge=1, description="Most tokens decoded between two decisions.")
    align_segments: bool = Field(
        False,
        description="Shorten segments so that they end one token past a block of the engine's prefix cache. Then the "
        "next segment computes one token again, and not up to a block.",
    )
    max_depth: int = Field(14, ge=1, description="Most segments on a path.")
    sampling: Sampling = Sampling()
    branching: AnyBranching = Field(LevelBudget(), description="Where and how often a tree forks.")
    stopping: AnyStopping = Field(EarlyStop(), description="When a path ends.")
    trim: bool = Field(
        False,
        description="Drop the rest of a segment after the token that completes an answer or a stop string.",
    )
    fallback: AnyFallback = Field(
        SegmentBoundary(),
        description="Where a tree goes on if all its paths have ended and leaves are still missing.",
    )
    retries: int = Field(
        2, ge=0, description="How often a failed request is repeated. After that its leaf ends in an error."
    )

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

    def wanted(self, lengths: Sequence[int]) -> int:
        """Leaves that a tree should have, judged by these lengths in response tokens ([]: nothing is known yet).

        Source: the code released with arXiv 2508.17445. Ours: while nothing is known, a leaf is taken to be as long as
        it may be, so that a tree starts with the number of leaves that is sure to fit.
        """
        if self.token_budget is None or self.mode == "iid":
            return self.width
        length = sum(lengths) / len(lengths) if lengths else self.response_tokens
        return max(self.min_width, min(self.width, int(self.token_budget / length)))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.token_budget is not None and self.min_width > self.width:
            raise ValueError(f"min_width {self.min_width} is above width {self.width}")
        return self


class TreeSampler(Protocol):
    """What grows a tree from a prompt: `Sampler`, or one of your own, such as one with tools or environments."""

    @property
    def response_tokens(self) -> int:
        """Most tokens of a response."""
        ...

    async def grow(self, prompt: Sequence[int], key: str, seed: int, progress: float = 0.0) -> Tree:
        """A finished tree; a function of the prompt, `key`, `seed` and what the engine replies.

        `key` is unique in its batch. `progress`: the part of the training that is done, 0 to 1. Leaves whose requests
        failed end in `Stop.ERROR` and say why (`Node.error`).
        """
        ...


@dataclass(frozen=True)
class Sampler:
    """Turns prompts into trees of exactly `width` leaves each, on any engine; see `grow` for the exceptions.

    The same seed gives the same trees, in whatever order the engine replies: every random choice is keyed by (seed, key
    of the prompt, place in the tree), and children join the tree in the order in which they were asked for.
    """

    engine: Engine
    settings: SamplerSettings
    decode: Callable[[Sequence[int]], str]  # response token ids -> text without special tokens
    stop_ids: Collection[int]

    @property
    def response_tokens(self) -> int:
        """Most tokens of a response."""
        return self.settings.response_tokens

    def sample(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        progress: float = 0.0,
        on_tree: Callable[[int, Tree], None] | None = None,
    ) -> list[Tree]:
        """The trees of `prompts`, in their order; `on_tree(index, tree)` is called as each one is complete.

        Works in a notebook too. Each call has an event loop of its own, so an engine with connections (`server`,
        `vllm`) needs `grow_all` on a loop that lives as long as the engine.
        """
        with EventLoop() as loop:
            return loop.run(self.grow_all(prompts, seed, progress=progress, on_tree=on_tree))

    async def grow_all(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        progress: float = 0.0,
        on_tree: Callable[[int, Tree], None] | None = None,
    ) -> list[Tree]:
        """As `sample`, on the event loop that runs."""

        async def one(index: int, key: str, prompt: Sequence[int]) -> Tree:
            tree = await self.grow(prompt, key, seed, progress)
            if on_tree:
                on_tree(index, tree)
            return tree

        return await together([one(i, key, prompt) for i, (key, prompt) in enumerate(prompts)])

    async def grow(self, prompt: Sequence[int], key: str, seed: int, progress: float = 0.0) -> Tree:
        """One tree of exactly `width` leaves; a leaf whose requests failed again and again ends in `Stop.ERROR`.

        With a `token_budget` it has `min_width` to `width` leaves, and would still have fewer than the budget allows if
        one were missing. It may also have fewer if the fallback names no place to go on from.
        """
        settings, iid = self.settings, self.settings.mode == "iid"
        tree = Tree(prompt, key=key, seed=derive(seed, key))
        handle = await self.engine.open(
            tree,
            settings.sampling,
            self.stop_ids,
            len(tree.prompt) + settings.tree_tokens,
            entropies=not iid and settings.branching.needs_entropies,
        )
        texts = {ROOT: ResponseText(self.decode)}  # of every node that may get children
        try:
            active, finished, level = [ROOT], list[int](), 0
            while True:
                ended = [node for node in active if tree.nodes[node].stop is not None]
                active = [node for node in active if tree.nodes[node].stop is None]
                finished += ended
                rng = generator(seed, key, "level", level)
                width = settings.wanted(self._lengths(tree, active, finished))
                frontier = Frontier(tree, active, finished, len(ended), width, settings.levels, progress, rng)
                if iid:
                    plan = {ROOT: width} if active else {}
                elif active:
                    plan = dict(zip(active, settings.branching(frontier), strict=True))
                else:
                    plan = self._fall_back(frontier) if frontier.remaining > 0 else {}
                if not plan:
                    break
                active = await self._decode(handle, tree, texts, plan)
                level += 1
        finally:
            handle.close()
        return tree

    async def _decode(
        self, handle: Handle, tree: Tree, texts: dict[int, ResponseText], plan: dict[int, int]
    ) -> list[int]:
        """Decode a segment for every planned child; returns the new nodes, finished where they are."""
        places = [(node, len(tree.children[node]) + i) for node, children in plan.items() for i in range(children)]
        seeds = [self._seed(tree, node, ordinal) for node, ordinal in places]
        replies = await together(
            [self._request(handle, tree, node, seed) for (node, _), seed in zip(places, seeds, strict=True)]
        )
        born = []
        for (node, _), seed, reply in zip(places, seeds, replies, strict=True):
            if isinstance(reply, EngineError):
                version = tree.nodes[node].version
                born.append(tree.add(node, [], [], seed=seed, version=version, stop=Stop.ERROR, error=str(reply)))
                continue
            text, stop, kept = self._judge(tree, node, self._text(tree, texts, node), reply.tokens)
            entropies = None if reply.entropies is None else reply.entropies[:kept]
            born.append(
                tree.add(
                    node,
                    reply.tokens[:kept],
                    reply.logprobs[:kept],
                    seed=seed,
                    version=reply.version,
                    stop=stop,
                    entropies=entropies,
                )
            )
            if stop is None:
                texts[born[-1]] = text.share(tree.nodes[born[-1]].tokens)
        return born

    async def _request(self, handle: Handle, tree: Tree, node: int, seed: int) -> Segment | EngineError:
        room = self.settings.response_tokens - tree.response_length(node)
        tokens = min(self.settings.level_tokens, room)
        if self.settings.align_segments and self.settings.mode == "tree":
            # The key-values of the last token are not there yet: the rest should be whole blocks.
            beyond = (len(tree.prompt) + tree.response_length(node) + tokens - 1) % self.engine.granularity
            tokens -= beyond if beyond < tokens < room else 0
        failure = EngineError("never asked")
        for _ in range(self.settings.retries + 1):
            try:
                return await handle.generate(node, tokens, seed)
            except EngineError as error:
                failure = error
        return failure

    @staticmethod
    def _text(tree: Tree, texts: dict[int, ResponseText], node: int) -> ResponseText:
        """The response up to the end of `node`. Nodes that a fallback has divided are not in `texts` yet."""
        missing = []
        while node not in texts:
            missing.append(node)
            node = tree.nodes[node].parent
        text = texts[node]
        for node in reversed(missing):
            text = texts[node] = text.after(tree.nodes[node].tokens)
        return text

    def _judge(
        self, tree: Tree, parent: int, before: ResponseText, new: Sequence[int]
    ) -> tuple[ResponseText, Stop | None, int]:
        """The path that goes on after `parent` with the tokens `new`: its text, why it ends, how many it keeps."""
        settings = self.settings
        length = tree.response_length(parent) + len(new) >= settings.response_tokens
        depth = tree.nodes[parent].depth + 1 >= settings.levels
        text = before.after(new)
        stop = settings.stopping(text, eos=new[-1] in self.stop_ids, length=length, depth=depth)
        if stop is None:
            return text, Stop.LENGTH if length else Stop.DEPTH if depth else None, len(new)
        if not settings.trim:
            return text, stop, len(new)

        def judged(kept: int) -> Stop | None:
            return settings.stopping(before.after(new[:kept]), eos=False, length=False, depth=False)

        # The first token with which an answer or a stop string is there: once there, it stays.
        complete = (Stop.ANSWER, Stop.STOP_STRING)
        kept = 1 + bisect_left(range(1, len(new)), True, key=lambda n: judged(n) in complete)
        return (text, stop, kept) if kept == len(new) else (text, judged(kept), kept)

    def _fall_back(self, frontier: Frontier) -> dict[int, int]:
        plan, remaining = Counter[int](), frontier.remaining
        children = self.settings.branching.again(frontier)
        for leaf, kept in self.settings.fallback(frontier, -(-remaining // children)):
            plan[frontier.tree.node_after(leaf, kept)] += min(children, remaining)
            remaining -= min(children, remaining)
        return dict(plan)

    def _lengths(self, tree: Tree, active: Sequence[int], finished: Sequence[int]) -> list[int]:
        """Response tokens of the leaves (but for failed ones) and, once there is one, of the active paths.

        These count with the segment that they are about to get: early leaves are short ones, and alone would mislead.
        """
        known = [tree.response_length(leaf) for leaf in finished if tree.nodes[leaf].stop is not Stop.ERROR]
        if not known:
            return []
        most, more = self.settings.response_tokens, self.settings.level_tokens
        return known + [min(most, tree.response_length(node) + more) for node in active]

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
