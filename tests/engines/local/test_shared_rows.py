"""Rows of an engine that read pages together; `test_shared_pages.py` has the pages alone."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import torch

from tests.support.local_growth import extend, forest, until
from tests.support.local_models import oracle, paged, plain_model, prepared, with_room
from treepo.engines import Sampling
from treepo.engines.local.decoding import DecodingLoop
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.tree import ROOT, Tree


def rows_of_pages(engine: LocalEngine) -> list[list[int]]:
    """For each row that is being decoded, how many rows read each of its pages."""
    slots = engine._loop.slots
    assert slots is not None
    readers = Counter(name for row in slots.rows for name in row.pages[: row.begin // engine.page])
    return [[readers[name] for name in row.pages[: row.begin // engine.page]] for row in slots.rows]


def test_what_several_rows_read_is_in_pages_and_the_rest_in_slots() -> None:
    engine = paged(4)(prepared(), LocalSettings(slots=8))

    async def run() -> None:
        tree = Tree([1] * 6)  # key-values 0 to 5
        handle = await engine.open(tree, Sampling(), [])
        (trunk,) = await extend(tree, handle, (ROOT, 8, 1))  # alone
        assert engine.stats.copied_tokens == 5 and not engine._loop.slots._reads
        calls = [asyncio.create_task(handle.generate(trunk, n, seed)) for n, seed in ((5, 2), (30, 3))]
        await until(lambda: engine.stats.steps >= 10)
        assert rows_of_pages(engine) == [[2, 2, 2]] * 2  # 13 key-values: three pages, and one for each slot
        assert engine.stats.copied_tokens == 5 + 3 * 4 + 2
        left = tree.add(trunk, (reply := await calls[0]).tokens, reply.logprobs, seed=2)
        calls += [asyncio.create_task(handle.generate(left, 30, seed)) for seed in (4, 5)]
        await until(lambda: engine.stats.steps >= 16)
        assert sorted(rows_of_pages(engine)) == [[3, 3, 3], [3, 3, 3, 2], [3, 3, 3, 2]]
        calls[1].cancel()
        calls[2].cancel()
        await until(lambda: engine.stats.steps >= 20)
        assert rows_of_pages(engine) == [[1, 1, 1, 1]]  # it stays where it is
        last = tree.add(left, (reply := await calls[3]).tokens, reply.logprobs, seed=5)
        expected = oracle(plain_model(), tree.tokens(last))[-30:]
        assert torch.allclose(expected, torch.tensor(reply.logprobs), atol=1e-5)
        handle.close()

    asyncio.run(run())


def test_siblings_that_join_one_after_the_other_share_their_pages() -> None:
    engine = paged(4)(prepared(), LocalSettings(slots=2))

    async def run() -> None:
        tree = Tree([1] * 10)
        handle = await engine.open(tree, Sampling(), [])
        other = await engine.open(Tree([2] * 3), Sampling(), [])
        calls = [asyncio.create_task(other.generate(ROOT, n, n)) for n in (5, 9)]
        calls += [asyncio.create_task(handle.generate(ROOT, 40, seed)) for seed in (1, 2)]
        await until(lambda: engine.stats.steps >= 7)
        assert sorted(rows_of_pages(engine)) == [[], [1, 1]]  # the second is in sight
        await until(lambda: engine.stats.steps >= 12)
        assert rows_of_pages(engine) == [[2, 2], [2, 2]]
        await asyncio.gather(*calls)
        assert not engine._queue.wanted
        for each in (handle, other):
            each.close()

    asyncio.run(run())


def test_pages_hold_of_a_forest_what_it_shares_and_nothing_is_left_in_sight() -> None:
    class Watching(DecodingLoop):
        shared = 0

        def step(self) -> None:
            super().step()
            if self.slots is not None and self.slots._reads is not None:
                self.shared = max(self.shared, sum(len(pages) for pages in rows_of_pages(engine)))

    class Watched(paged(4)):  # type: ignore[misc]
        loop = Watching

    engine = Watched(prepared(), LocalSettings(slots=64))
    forest(engine)
    assert engine._loop.shared > 50
    assert not engine._queue.wanted and engine._loop.slots is None


@pytest.mark.parametrize("reason", ["memory", "short"])
def test_no_pages_are_made_under_a_memory_limit_or_for_short_prefixes(reason: str) -> None:
    settings = with_room(2000, 64) if reason == "memory" else LocalSettings()

    class Watching(DecodingLoop):
        def step(self) -> None:
            assert self.slots is None or self.slots._reads is None
            super().step()

    class Watched(paged(4 if reason == "memory" else 64)):  # type: ignore[misc]
        loop = Watching

    engine = Watched(prepared(), settings)
    forest(engine)
    assert engine.stats.steps
