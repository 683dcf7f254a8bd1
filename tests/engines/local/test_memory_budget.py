"""Trees that share a limited memory: the bound holds, nobody starves, and the trees stay the same."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.local_growth import forest, grow, until
from tests.support.local_models import PROMPTS, V, prepared, with_room
from treepo.engines import Sampling
from treepo.engines.local.decoding import DecodingLoop
from treepo.engines.local.engine import LocalEngine
from treepo.engines.local.kv_store import KVStore, MemoryBudget
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError, EngineError
from treepo.policies.branching import LevelBudget
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import ROOT, Tree


class WatchedLoop(DecodingLoop):
    """Remembers the most tokens of key-values that were there at once: those kept, and those that rows will leave."""

    peak = 0

    def step(self) -> None:
        kept = sum(session.store.tokens for session in self.queue.sessions)
        self.peak = max(self.peak, kept + sum(row.max_tokens for row in self.rows))
        super().step()


class Watched(LocalEngine):
    loop = WatchedLoop


@settings(max_examples=8)
@given(
    prompts=st.lists(st.lists(st.integers(2, V - 1), min_size=1, max_size=20), min_size=1, max_size=5),
    slots=st.integers(1, 9),
    spare=st.integers(0, 500),
    stops=st.sampled_from([(), (0, 1, 2, 3)]),
    known=st.booleans(),
)
def test_a_tight_budget_is_kept_and_changes_no_tree(
    prompts: list[list[int]], slots: int, spare: int, stops: tuple[int, ...], known: bool
) -> None:
    def run(engine: LocalEngine, most: list[int | None]) -> list[Tree]:
        trees = [Tree(prompt, key=str(i)) for i, prompt in enumerate(prompts)]

        async def all_of_them() -> None:
            jobs = (grow(engine, tree, Sampling(), stops=stops, most=m) for tree, m in zip(trees, most, strict=True))
            await asyncio.wait_for(asyncio.gather(*jobs), 100)  # trees that wait for each other wait for ever

        asyncio.run(all_of_them())
        return trees

    free = run(LocalEngine(prepared()), [None] * len(prompts))
    # Without stop ids what a tree holds is known exactly; with them it is bounded by what its segments might have had.
    most = [len(t.prompt) + (21 * 9 + 8 * 9 if stops else t.unique_tokens) for t in free]
    engine = Watched(prepared(), with_room(max(most) + spare, slots))
    trees = run(engine, list(most) if known else [None] * len(most))
    for a, b in zip(trees, free, strict=True):
        assert a.children == b.children and [n.tokens for n in a.nodes] == [n.tokens for n in b.nodes]
    assert 0 < engine._loop.peak <= max(most) + spare
    assert engine.stats.prefilled_tokens == sum(len(prompt) - 1 for prompt in prompts)
    assert not engine.cached_tokens


def test_trees_whose_most_fits_grow_side_by_side() -> None:
    most = [len(tree.prompt) + tree.unique_tokens for tree in forest(LocalEngine(prepared()))]
    steps = []
    for tokens in (max(most), sum(most)):
        engine = Watched(prepared(), with_room(tokens, 64))

        async def run(engine: LocalEngine = engine) -> None:
            trees = [Tree(prompt, key=str(i)) for i, prompt in enumerate(PROMPTS)]
            await asyncio.gather(*(grow(engine, t, Sampling(), most=m) for t, m in zip(trees, most, strict=True)))

        asyncio.run(run())
        assert engine._loop.peak <= tokens
        steps.append(engine.stats.steps)
    assert steps[1] < steps[0]
    free = LocalEngine(prepared())
    forest(free)
    assert steps[1] == free.stats.steps


@pytest.mark.parametrize("mode", ["tree", "iid"])
def test_a_sampler_says_how_much_its_trees_need(mode: str) -> None:
    forks = LevelBudget(first_divergence=2)
    shape = SamplerSettings(mode=mode, width=4, segment_tokens=3, max_depth=2, branching=forks)
    prompts = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    most = [len(prompt) + 4 * 3 * 2 for prompt in PROMPTS]
    engines = [LocalEngine(prepared(), with_room(tokens, 64)) for tokens in (max(most), sum(most))]
    engines += [LocalEngine(prepared()), LocalEngine(prepared(), with_room(max(most) - 1, 64))]
    one_by_one, all_at_once, free, too_small = engines
    sampled = [Sampler(engine, shape, str, ()).sample(prompts, seed=1) for engine in engines[:3]]
    for trees in sampled[1:]:
        assert [[n.tokens for n in t.nodes] for t in trees] == [[n.tokens for n in t.nodes] for t in sampled[0]]
    assert one_by_one.stats.steps > all_at_once.stats.steps == free.stats.steps
    with pytest.raises(EngineError, match=rf"may come to {max(most)} tokens, and engine\.memory_gib=.*{max(most) - 1}"):
        Sampler(too_small, shape, str, ()).sample(prompts, seed=1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 60), st.integers())
def test_whoever_takes_what_it_may_leaves_room_for_every_older_store(most: list[int], spare: int, seed: int) -> None:
    rng = random.Random(seed)
    budget = MemoryBudget(max(most) + spare)
    stores = [KVStore(m) for m in most]
    while stores:
        slack = budget.slack(stores)
        assert slack[stores[0]] == stores[0].limit - sum(stores[0].held.values())  # the oldest never waits
        store = rng.choice(stores)
        store.held[len(store.held)] = rng.randint(0, slack[store])
        assert sum(sum(t.held.values()) for t in stores) <= budget.tokens
        if sum(store.held.values()) == store.limit:
            stores.remove(store)


def test_slack_by_hand() -> None:
    stores = [KVStore(most) for most in (60, 50, 40)]
    stores[0].held, stores[1].held = {1: 10}, {1: 12, 2: 8}
    # The first may come to 60 while the others have 20: they share the remaining 20.
    assert list(MemoryBudget(100).slack(stores).values()) == [50, 20, 20]
    # The first leaves 40 then, of which 20 are taken; the second may come to 50.
    assert list(MemoryBudget(90).slack(stores).values()) == [50, 10, 10]
    stores[0].limit = 15
    assert list(MemoryBudget(60).slack(stores).values()) == [5, 25, 10]


def test_what_can_never_fit_says_so() -> None:
    with pytest.raises(ConfigError, match=r"engine\.memory_gib=0\.001: 128 slots of 128 tokens alone take 0\.00391"):
        LocalEngine(prepared(), LocalSettings(memory_gib=0.001))
    engine = LocalEngine(prepared(), with_room(100, 2))

    async def run() -> None:
        with pytest.raises(EngineError, match=r"101 tokens, and engine\.memory_gib=.* has room for 100"):
            await engine.open(Tree(PROMPTS[0]), Sampling(), [], 101)
        handle = await engine.open(Tree(PROMPTS[0]), Sampling(), [], 30)
        with pytest.raises(EngineError, match=r"room for the key-values of 30 tokens, and its requests come to 31"):
            await handle.generate(ROOT, 27, 1)
        assert len((await handle.generate(ROOT, 20, 3)).tokens) == 20
        handle.close()

    asyncio.run(run())


def test_a_cancelled_call_gives_its_memory_back() -> None:
    engine = LocalEngine(prepared(), with_room(50, 2))

    async def run() -> None:
        handle = await engine.open(Tree(PROMPTS[0]), Sampling(), [], 50)
        for seed in range(5):
            call = asyncio.create_task(handle.generate(ROOT, 40, seed))
            begin = engine.stats.steps
            await until(lambda call=call, begin=begin: call.done() or engine.stats.steps >= begin + 5)
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
        handle.close()

    asyncio.run(run())
