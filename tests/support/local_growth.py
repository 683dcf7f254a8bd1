"""Grows trees on the embedded engine without a sampler: ragged levels, late forks, single segments."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.local_models import PROMPTS
from treepo.engines import Sampling, Segment
from treepo.engines.local.engine import LocalEngine, LocalHandle
from treepo.tree import ROOT, Stop, Tree


async def extend(tree: Tree, handle: LocalHandle, *jobs: tuple[int, int, int]) -> list[int]:
    """Children for jobs (node, max_tokens, seed), added in the order of the jobs, not of the replies."""
    replies = await asyncio.gather(*(handle.generate(*job) for job in jobs))
    return [
        tree.add(node, reply.tokens, reply.logprobs, seed=seed, version=reply.version)
        for (node, _, seed), reply in zip(jobs, replies, strict=True)
    ]


async def grow(
    engine: LocalEngine,
    tree: Tree,
    sampling: Sampling,
    *,
    stops: Iterable[int] = (),
    most: int | None = None,
    cuts: int = 8,
    close: bool = True,
) -> LocalHandle:
    """Ragged levels of forks, then late forks: `cuts` continuations of leaves cut at arbitrary tokens."""
    rng, handle = random.Random(len(tree.prompt)), await engine.open(tree, sampling, list(stops), most)
    seeds = iter(range(1, 1000))
    level = [ROOT]
    for width in (3, 2, 2):
        jobs = [(node, rng.randint(1, 9), next(seeds)) for node in level for _ in range(width)]
        level = await extend(tree, handle, *jobs)
    for leaf in level:
        tree.finish(leaf, Stop.LENGTH)
    for _ in range(cuts):
        leaf = rng.choice(tree.leaves())
        node = tree.node_after(leaf, rng.randint(0, tree.response_length(leaf) - 1))
        (late,) = await extend(tree, handle, (node, rng.randint(1, 9), next(seeds)))
        tree.finish(late, Stop.LENGTH)
    if close:
        handle.close()
    return handle


def forest(engine: LocalEngine, sampling: Sampling | None = None, prompts: Iterable[list[int]] = PROMPTS) -> list[Tree]:
    """A grown tree for each prompt, all at once."""
    trees = [Tree(prompt, key=str(i)) for i, prompt in enumerate(prompts)]

    async def run() -> None:
        await asyncio.gather(*(grow(engine, tree, sampling or Sampling()) for tree in trees))

    asyncio.run(run())
    return trees


def segment(engine: LocalEngine, prompt: list[int], n: int, seed: int, sampling: Sampling, stops: Any = ()) -> Segment:
    """One segment of a tree of its own."""

    async def run() -> Segment:
        handle = await engine.open(Tree(prompt), sampling, stops)
        reply = await handle.generate(ROOT, n, seed)
        handle.close()
        return reply

    return asyncio.run(run())


def segments(engine: LocalEngine, prompt: list[int], n: int, seeds: Iterable[int], sampling: Sampling) -> list[Segment]:
    async def run() -> list[Segment]:
        handle = await engine.open(Tree(prompt), sampling, [])
        replies = await asyncio.gather(*(handle.generate(ROOT, n, seed) for seed in seeds))
        handle.close()
        return replies

    return asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)
