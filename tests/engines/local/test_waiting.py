"""Whom the decoding waits for before a step: callers that will ask again, and nobody else for long.

Time is counted in turns of the event loop, never by a clock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.local_growth import extend, until
from tests.support.local_models import PROMPTS, prepared, with_room
from treepo.engines import Sampling
from treepo.engines.local.batch import LocalStats
from treepo.engines.local.decoding import DecodingLoop
from treepo.engines.local.engine import LocalEngine, LocalHandle, prefix_of
from treepo.engines.settings import LocalSettings
from treepo.tree import ROOT, Tree

LENGTHS = [[5, 5, 5, 5], [2, 3, 5, 10], [10, 5, 3, 2], [1, 9, 1, 9]]  # of the segments of each tree: 20 tokens


async def pause(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


class Clock:
    """Counts the turns of the event loop."""

    turns = 0

    async def __aenter__(self) -> Clock:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.turns += 1


def chains(engine: LocalEngine, turns: Callable[[], int]) -> list[Tree]:
    """A tree of two paths for each prompt, whose caller needs so many `turns` before each level."""
    trees = [Tree(prompt, key=str(i)) for i, prompt in enumerate(PROMPTS)]

    async def one(tree: Tree, lengths: list[int]) -> None:
        handle = await engine.open(tree, Sampling(), [])
        ends = [ROOT, ROOT]
        for level, length in enumerate(lengths):
            await pause(turns())
            ends = await extend(tree, handle, *((end, length, 2 * level + i) for i, end in enumerate(ends)))
        handle.close()

    async def run() -> None:
        await asyncio.gather(*(one(tree, lengths) for tree, lengths in zip(trees, LENGTHS, strict=True)))

    asyncio.run(run())
    return trees


def tokens(trees: list[Tree]) -> list[list[list[int]]]:
    """Which log-probs a token has depends on the rows beside it, in the last bits; which token it is does not."""
    return [[node.tokens for node in tree.nodes] for tree in trees]


@pytest.mark.parametrize("slots", [3, 64])
def test_a_caller_of_many_awaits_fills_the_batch_as_a_direct_one_does(slots: int) -> None:
    direct, slow = (LocalEngine(prepared(), LocalSettings(slots=slots)) for _ in range(2))
    assert chains(slow, lambda: 20) == chains(direct, lambda: 0)
    assert slow.stats == direct.stats
    if slots == 64:
        assert slow.stats.steps == 20, "every step is shared by all trees"


def test_without_patience_the_batch_is_not_filled() -> None:
    class Hasty(DecodingLoop):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.expected.patience = 6

    class Mutant(LocalEngine):
        loop = Hasty

    engine = Mutant(prepared())
    assert tokens(chains(engine, lambda: 20)) == tokens(chains(LocalEngine(prepared()), lambda: 0))
    assert engine.stats.steps > 30


def test_two_runs_give_equal_trees_and_equal_counts() -> None:
    def run() -> tuple[list[Tree], LocalStats]:
        engine, rng = LocalEngine(prepared(), LocalSettings(slots=3)), random.Random(1)
        return chains(engine, lambda: rng.choice([0, 3, 30, 300])), engine.stats

    first, second = run(), run()
    assert first == second
    assert tokens(first[0]) == tokens(chains(LocalEngine(prepared()), lambda: 0))
    assert first[1].decoded_tokens == 4 * 2 * 20


async def opened(engine: LocalEngine, number: int) -> list[LocalHandle]:
    return [await engine.open(Tree(PROMPTS[0], key=str(i)), Sampling(), []) for i in range(number)]


@pytest.mark.parametrize("first", ["asks once", "never asks"])
def test_a_tree_that_waits_for_another_is_waited_for_once(first: str) -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        waiting, busy = await opened(engine, 2)
        call = asyncio.create_task(busy.generate(ROOT, 60, 1))
        async with Clock() as clock:
            if first == "asks once":
                await waiting.generate(ROOT, 1, 1)
            assert len((await call).tokens) == 60
            assert 100 <= clock.turns < 100 + 2 * 60  # not 100 turns for each step
            await waiting.generate(ROOT, 1, 2)
        waiting.close()
        busy.close()

    asyncio.run(run())
    assert engine.stats.steps == 61


def test_a_tree_with_a_request_under_way_is_not_waited_for() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        (handle,) = await opened(engine, 1)
        async with Clock() as clock:
            await asyncio.gather(*(handle.generate(ROOT, length, length) for length in (5, 10, 15, 20)))
            assert clock.turns < 2 * 20
        handle.close()

    asyncio.run(run())


def test_a_tree_that_has_asked_again_is_waited_for_again() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        tree = Tree(PROMPTS[0])
        handle = await engine.open(tree, Sampling(), [])
        (other,) = await opened(engine, 1)
        call = asyncio.create_task(other.generate(ROOT, 40, 1))
        end = ROOT
        for level in range(4):
            (end,) = await extend(tree, handle, (end, 5, level))
            before = engine.stats.steps
            await pause(110 if level == 0 else 90)  # once too long, then not
            assert (5 < engine.stats.steps - before < 15) if level == 0 else engine.stats.steps == before
        await call
        assert engine.stats.steps == 40, "both shared all steps but those of the long pause"
        handle.close()
        other.close()

    asyncio.run(run())


def test_while_all_callers_are_busy_nothing_runs() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        handles = await opened(engine, 2)
        await asyncio.gather(*(handle.generate(ROOT, 3, 1) for handle in handles))
        await pause(150)
        assert engine._loop._task is None
        await asyncio.gather(*(handle.generate(ROOT, 3, 2) for handle in handles))
        assert engine.stats.steps == 6, "they share steps again"
        for handle in handles:
            handle.close()

    asyncio.run(run())


def test_a_session_that_need_not_ask_again_is_never_waited_for() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        sessions = [engine.open_session("the prompt", asks_again=False) for _ in range(10)]
        tree = Tree(PROMPTS[0])

        async def ask(number: int, tokens: int) -> None:
            await engine.generate(
                sessions[number],
                prefix_of(tree, ROOT),
                tokens,
                name=tokens,
                seed=tokens,
                sampling=Sampling(),
                stop_ids=frozenset(),
            )

        async with Clock() as clock:
            await asyncio.gather(*(ask(number, 2 + 3 * number) for number in range(9)))  # the last one never asks
            assert engine.stats.steps == 26
            assert clock.turns < 2 * 26
        for session in sessions:
            engine.close_session(session)

    asyncio.run(run())


def test_a_caller_whose_requests_are_cancelled_or_failed_is_waited_for_too() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        first, second = await opened(engine, 2)
        calls = [asyncio.create_task(first.generate(ROOT, 40, 1)), asyncio.create_task(second.generate(ROOT, 10, 1))]
        await until(lambda: engine.stats.steps >= 5)
        calls[0].cancel()
        await pause(20)
        assert engine.stats.steps <= 6
        await first.generate(ROOT, 4, 2)
        assert engine.stats.steps <= 10
        await calls[1]
        first.close()
        second.close()

    asyncio.run(run())


def test_memory_that_a_cancelled_request_frees_goes_to_those_who_wait() -> None:
    engine = LocalEngine(prepared(), with_room(60, 2))

    async def run() -> None:
        # The oldest may still come to 10 tokens. The youngest holds 15, so the one between may have 35 and wants 44.
        handles = [await engine.open(Tree(PROMPTS[0], key=str(most)), Sampling(), [], most) for most in (10, 45, 16, 5)]
        young = asyncio.create_task(handles[2].generate(ROOT, 11, 1))
        await until(lambda: engine.stats.steps >= 5)
        between = asyncio.create_task(handles[1].generate(ROOT, 40, 1))
        await until(lambda: engine.stats.steps >= 8)
        young.cancel()
        handles[3].close()  # so the decoding looks for waiting requests before the cancelled caller has run
        await pause(1000)
        assert between.done() and len((await between).tokens) == 40
        for handle in handles:
            handle.close()

    asyncio.run(run())
