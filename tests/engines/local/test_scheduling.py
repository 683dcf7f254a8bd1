"""Which requests share a step, in which order, and that none of this changes a tree or computes anything twice."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.local_growth import extend, forest, segment, segments
from tests.support.local_models import PROMPTS, paged, prepared
from treepo.engines import Sampling
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.tree import ROOT, Tree


@pytest.mark.parametrize("page", [4, 64])
@pytest.mark.parametrize("slots", [2, 5, 64])
def test_no_prefix_is_ever_recomputed(slots: int, page: int) -> None:
    engine = paged(page)(prepared(), LocalSettings(slots=slots))
    trees = forest(engine)
    assert engine.stats.prefilled_tokens == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert engine.stats.decoded_tokens == sum(tree.unique_tokens for tree in trees)


def test_the_first_child_goes_on_in_the_slot_of_its_parent() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        tree = Tree(PROMPTS[0])
        handle = await engine.open(tree, Sampling(), [])
        (node,) = await extend(tree, handle, (ROOT, 6, 1))
        await extend(tree, handle, (node, 6, 2), (node, 6, 3))
        handle.close()

    asyncio.run(run())
    assert engine.stats.continued_tokens == 5 + 6 - 1
    assert engine.stats.copied_tokens == (5 - 1) + (5 + 6 - 1)


def test_slots_stay_full_while_requests_wait() -> None:
    engine = LocalEngine(prepared(), LocalSettings(slots=4))
    lengths = [3, 9, 2, 7, 5, 5, 1, 8, 4, 4, 6, 2]

    async def run() -> None:
        handle = await engine.open(Tree(PROMPTS[0]), Sampling(), [])
        await asyncio.gather(*(handle.generate(ROOT, n, seed) for seed, n in enumerate(lengths)))
        handle.close()

    asyncio.run(run())
    # Greedy list scheduling on 4 machines: never more than the mean load plus the longest job.
    assert engine.stats.decoded_tokens == sum(lengths)
    assert engine.stats.steps <= sum(lengths) / 4 + max(lengths)


def test_deeper_requests_go_first_and_equals_in_order_of_arrival() -> None:
    engine = LocalEngine(prepared(), LocalSettings(slots=1))
    order: list[str] = []

    async def run() -> None:
        tree = Tree(PROMPTS[0])
        handle = await engine.open(tree, Sampling(), [])
        (node,) = await extend(tree, handle, (ROOT, 2, 100))

        async def note(name: str, *request: int) -> None:
            await handle.generate(*request)
            order.append(name)

        await asyncio.gather(
            note("shallow, first", ROOT, 2, 1),
            note("deep, first", node, 2, 2),
            note("shallow, second", ROOT, 2, 3),
            note("deep, second", node, 2, 4),
        )
        handle.close()

    asyncio.run(run())
    assert order == ["deep, first", "deep, second", "shallow, first", "shallow, second"]


@pytest.mark.parametrize("page", [4, 64])
def test_a_seed_names_its_tokens_whatever_is_decoded_beside_it(page: int) -> None:
    alone = [segment(LocalEngine(prepared()), PROMPTS[0], 20, seed, Sampling()).tokens for seed in range(12)]
    for slots in (1, 5, 64):
        engine = paged(page)(prepared(), LocalSettings(slots=slots))
        replies = segments(engine, PROMPTS[0], 20, range(12), Sampling())
        assert [reply.tokens for reply in replies] == alone
    assert len({tuple(tokens) for tokens in alone}) == 12


@pytest.mark.parametrize("page", [1, 4, 8])
def test_a_whole_forest_is_the_same_for_any_number_of_slots_and_any_pages(page: int) -> None:
    wide = forest(LocalEngine(prepared(), LocalSettings(slots=64)))
    for a, b in zip(
        wide * 2, [t for n in (64, 3) for t in forest(paged(page)(prepared(), LocalSettings(slots=n)))], strict=True
    ):
        assert a.children == b.children and [n.tokens for n in a.nodes] == [n.tokens for n in b.nodes]
