"""The embedded engine against plain forward passes: exact log-probs, no recomputed prefix, draws fixed by seed."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from treepo.engines import Sampling, Segment, kvcache
from treepo.engines.local.engine import LocalEngine, LocalHandle
from treepo.engines.local.token_sampling import NUCLEUS, WIDER, Draw, invert, uniform
from treepo.engines.local.tree_cache import Budget, Kept
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError, EngineError
from treepo.models import causal_lm
from treepo.policies.branching import LevelBudget
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import ROOT, Stop, Tree

V = 40
FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4]]


def plain_model(family: str = "qwen2", kv_heads: int = 2, *, seed: int = 0, context: int = 128) -> Any:
    """An unprepared model of random weights, large enough that what it says depends on every token before."""
    config, cls = FAMILIES[family]
    torch.manual_seed(seed)
    model = cls(
        config(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=8,
            intermediate_size=48,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model


def prepared(**options: Any) -> Any:
    return causal_lm.prepare(plain_model(**options))


def paged(size: int) -> type[LocalEngine]:
    """An engine of pages so small that the trees of these tests have many."""

    class Paged(LocalEngine):
        page = size

    return Paged


def oracle(plain: Any, tokens: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs [T - 1] of tokens[1:] from one full forward of a model that never met treepo."""
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def worst_error(plain: Any, tree: Tree, temperature: float = 1.0) -> float:
    """Largest difference between a node's log-probs and the oracle's, over every node of the tree."""
    worst = 0.0
    for index, node in enumerate(tree.nodes[1:], 1):
        expected = oracle(plain, tree.tokens(index), temperature)[-len(node.tokens) :]
        worst = max(worst, (expected - torch.tensor(node.logprobs)).abs().max().item())
    return worst


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


# ------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("page", [1, 4, 8, 64])
@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize(("family", "kv_heads"), [("qwen2", 2), ("qwen2", 4), ("llama", 2), ("llama", 1), ("qwen3", 2)])
def test_every_log_prob_equals_that_of_a_plain_forward(family: str, kv_heads: int, slots: int, page: int) -> None:
    plain = plain_model(family=family, kv_heads=kv_heads)
    engine = paged(page)(prepared(family=family, kv_heads=kv_heads), LocalSettings(slots=slots))
    for tree in forest(engine):
        assert len(tree.leaves()) == 20
        assert worst_error(plain, tree) < 1e-5


class SeesOneTooMany(kvcache.Decode):
    """Mutant: each query sees the stale key after its own."""

    def __init__(self, cache: kvcache.Cache, positions: Tensor, longest: int) -> None:
        super().__init__(cache, positions, longest)
        self._bias = torch.cat((self._bias[..., :1], self._bias[..., :-1]), -1)


class WritesTooEarly(kvcache.Decode):
    """Mutant: keys land one place before their own."""

    def __init__(self, cache: kvcache.Cache, positions: Tensor, longest: int) -> None:
        super().__init__(cache, positions, longest)
        self._positions = positions - 1


class ReadsTooLate(kvcache.Cache):
    """Mutant: what a segment leaves behind begins one token late."""

    def read(self, slot: int, begin: int, end: int) -> Tensor:
        return super().read(slot, begin + 1, end + 1)


@pytest.mark.parametrize("mutant", [SeesOneTooMany, WritesTooEarly, ReadsTooLate])
def test_the_oracle_rejects_what_is_off_by_one(mutant: Any) -> None:
    class Mutated(LocalEngine):
        plan = mutant if issubclass(mutant, kvcache.Decode) else kvcache.Decode
        cache = mutant if issubclass(mutant, kvcache.Cache) else kvcache.Cache

    (tree,) = forest(Mutated(prepared(), LocalSettings(slots=3)), prompts=PROMPTS[:1])
    assert worst_error(plain_model(), tree) > 1e-3


def test_temperature_is_part_of_the_distribution_sampled() -> None:
    (tree,) = forest(LocalEngine(prepared()), Sampling(temperature=0.7), PROMPTS[:1])
    assert worst_error(plain_model(), tree, temperature=0.7) < 1e-5
    assert worst_error(plain_model(), tree, temperature=1.0) > 1e-2


def test_a_path_that_this_engine_did_not_sample_is_prefilled_and_exact() -> None:
    engine = LocalEngine(prepared())
    tree = Tree([1, 2, 3])
    node = tree.add(tree.add(ROOT, [4, 5], [-1.0, -1.0], seed=77), [6], [-1.0], seed=78)

    async def run() -> None:
        handle = await engine.open(tree, Sampling(), [])
        for child in await extend(tree, handle, (node, 5, 1), (node, 5, 2)):
            expected = oracle(plain_model(), tree.tokens(child))[-5:]
            assert torch.allclose(expected, torch.tensor(tree.nodes[child].logprobs), atol=1e-5)
        assert engine.stats.prefilled_tokens == 5
        handle.close()

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ work


def key_values(plain: Any, prefix: list[int]) -> Tensor:
    """[layers, 2, K, t, d] as transformers caches them when the prefix is computed alone."""
    with torch.no_grad():
        cache = plain(input_ids=torch.tensor([prefix]), use_cache=True).past_key_values
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])


@pytest.mark.parametrize("most", [1, 6, 14, 10_000])
def test_a_packed_prefill_equals_one_of_each_prompt(most: int) -> None:
    plain, passes = plain_model(), []
    model = prepared()
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: passes.append(ids[0].numel()))
    with torch.no_grad():
        found = list(kvcache.prefill(model, PROMPTS, most))
    for prefix, kv in zip(PROMPTS, found, strict=True):
        torch.testing.assert_close(kv, key_values(plain, prefix), atol=1e-6, rtol=1e-5)
    assert passes == {1: [5, 1, 12, 2], 6: [6, 12, 2], 14: [6, 14], 10_000: [20]}[most]  # no padding


@pytest.mark.parametrize("slots", [3, 7, 64])
def test_steps_that_are_recorded_and_replayed_draw_the_same_trees(slots: int) -> None:
    class Replaying(LocalEngine):
        def _decoder(self) -> Any:
            slots = super()._decoder()
            slots.steps.graphs = True
            sizes.update(slots.steps._recorded)
            return slots

    sizes: set[tuple[int, int]] = set()
    trees = forest(Replaying(prepared(), LocalSettings(slots=slots)))
    for a, b in zip(trees, forest(LocalEngine(prepared(), LocalSettings(slots=slots))), strict=True):
        assert [n.tokens for n in a.nodes] == [n.tokens for n in b.nodes]
        assert worst_error(plain_model(), a) < 1e-5
    assert {rows for rows, _ in sizes} <= {1, 2, 4, 8, 16, 32, slots}
    assert {keys for _, keys in sizes} <= {16, 32, 64, 128}


def test_a_step_is_recorded_once_for_its_sizes_and_again_when_the_cache_has_grown() -> None:
    model = prepared()
    with torch.no_grad():
        cache = kvcache.Cache(model, 64, 1024)
        steps = kvcache.Steps(model, cache, kvcache.Decode, graphs=True)
        recorded = []
        for position, slots in ((0, 3), (1, 4), (2, 4)):
            if position == 2:
                cache.reserve(32, 512)
            steps(torch.ones(slots, dtype=torch.long), torch.full((slots,), position), position + 1)
            recorded.append(steps._recorded[4, 16])
    assert recorded[0] is recorded[1] is not recorded[2]


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


def test_closing_a_tree_frees_its_key_values_and_closing_the_last_one_frees_the_slots() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        trees = [Tree(PROMPTS[0]), Tree(PROMPTS[2])]
        first, second = [await grow(engine, tree, Sampling(), close=False) for tree in trees]
        kept = [len(tree.prompt) - 1 + tree.unique_tokens for tree in trees]
        assert engine.cached_tokens == sum(kept)
        first.close()
        assert engine.cached_tokens == kept[1]
        second.close()
        assert engine.cached_tokens == 0 and engine._slots is None
        with pytest.raises(RuntimeError, match="closed"):
            await first.generate(ROOT, 1, 0)

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ pages


def rows_of_pages(engine: LocalEngine) -> list[list[int]]:
    """For each row that is being decoded, how many rows read each of its pages."""
    slots = engine._slots
    assert slots is not None
    readers = Counter(name for row in slots.rows for name in row.pages[: row.begin // engine.page])
    return [[readers[name] for name in row.pages[: row.begin // engine.page]] for row in slots.rows]


def test_what_several_rows_read_is_in_pages_and_the_rest_in_slots() -> None:
    engine = paged(4)(prepared(), LocalSettings(slots=8))

    async def run() -> None:
        tree = Tree([1] * 6)  # key-values 0 to 5
        handle = await engine.open(tree, Sampling(), [])
        (trunk,) = await extend(tree, handle, (ROOT, 8, 1))  # alone
        assert engine.stats.copied_tokens == 5 and not engine._slots._reads
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
        assert not engine._wanted
        for each in (handle, other):
            each.close()

    asyncio.run(run())


def test_pages_hold_of_a_forest_what_it_shares_and_nothing_is_left_in_sight() -> None:
    class Watching(paged(4)):  # type: ignore[misc]
        shared = 0

        def _step(self) -> bool:
            ended = super()._step()
            slots = self._slots
            if slots is not None and slots._reads is not None:
                self.shared = max(self.shared, sum(len(pages) for pages in rows_of_pages(self)))
            return ended

    engine = Watching(prepared(), LocalSettings(slots=64))
    forest(engine)
    assert engine.shared > 50
    assert not engine._wanted and engine._slots is None


@pytest.mark.parametrize("reason", ["memory", "short"])
def test_no_pages_are_made_under_a_memory_limit_or_for_short_prefixes(reason: str) -> None:
    settings = with_room(2000, 64) if reason == "memory" else LocalSettings()

    class Watching(paged(4 if reason == "memory" else 64)):  # type: ignore[misc]
        def _step(self) -> bool:
            assert self._slots is None or self._slots._reads is None
            return super()._step()

    engine = Watching(prepared(), settings)
    forest(engine)
    assert engine.stats.steps


# ------------------------------------------------------------------------------------------------ memory


class Watched(LocalEngine):
    """Remembers the most tokens of key-values that were there at once: those kept, and those that rows will leave."""

    peak = 0

    def _step(self) -> bool:
        self.peak = max(self.peak, self.cached_tokens + sum(row.max_tokens for row in self._rows))
        return super()._step()


def with_room(tokens: int, slots: int, context: int = 64) -> LocalSettings:
    """Settings that leave room for `tokens` beside the slots of the model of these tests."""
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size of a head, float32
    return LocalSettings(slots=slots, max_tokens=context, memory_gib=(tokens + slots * context) * token_bytes / 2**30)


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
    assert 0 < engine.peak <= max(most) + spare
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
def test_whoever_takes_what_it_may_leaves_room_for_every_older_tree(most: list[int], spare: int, seed: int) -> None:
    rng = random.Random(seed)
    budget = Budget(max(most) + spare)
    trees = [Kept(Tree([1]), m) for m in most]
    while trees:
        slack = budget.slack(trees)
        assert slack[trees[0]] == trees[0].most - sum(trees[0].held.values())  # the oldest never waits
        tree = rng.choice(trees)
        tree.held[len(tree.held)] = rng.randint(0, slack[tree])
        assert sum(sum(t.held.values()) for t in trees) <= budget.tokens
        if sum(tree.held.values()) == tree.most:
            trees.remove(tree)


def test_slack_by_hand() -> None:
    trees = [Kept(Tree([1]), most) for most in (60, 50, 40)]
    trees[0].held, trees[1].held = {1: 10}, {1: 12, 2: 8}
    # The first may come to 60 while the others have 20: they share the remaining 20.
    assert list(Budget(100).slack(trees).values()) == [50, 20, 20]
    # The first leaves 40 then, of which 20 are taken; the second may come to 50.
    assert list(Budget(90).slack(trees).values()) == [50, 10, 10]
    trees[0].most = 15
    assert list(Budget(60).slack(trees).values()) == [5, 25, 10]


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


# ------------------------------------------------------------------------------------------------ draws


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


def test_greedy_equals_the_generate_of_transformers() -> None:
    plain = plain_model()
    prompt = PROMPTS[2]
    expected = plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)[0, len(prompt) :].tolist()
    reply = segment(LocalEngine(prepared()), prompt, 30, 5, Sampling(temperature=0))
    assert reply.tokens == expected
    assert reply.logprobs == [0.0] * 30


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=3), Sampling(top_p=0.6), Sampling(top_k=5, top_p=0.8, temperature=1.5), Sampling(top_k=1000)],
)
def test_filters_keep_their_support_and_renormalise(sampling: Sampling) -> None:
    plain, prompt = plain_model(), PROMPTS[0]
    for reply in segments(LocalEngine(prepared()), prompt, 25, range(8), sampling):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + reply.tokens])).logits[0, len(prompt) - 1 : -1]
        for row, token, logprob in zip(logits, reply.tokens, reply.logprobs, strict=True):
            assert math.isclose(filtered(row, sampling)[token], math.exp(logprob), rel_tol=1e-4)


def filtered(logits: Tensor, sampling: Sampling) -> dict[int, float]:
    """The distribution after temperature, top-k and top-p, token by token as their definitions say."""
    p = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])[: sampling.top_k or None]
    total = sum(p[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if sampling.top_p == 1 or mass < sampling.top_p * total:
            kept.append(token)
            mass += p[token]
    return {token: p[token] / mass for token in kept}


@pytest.mark.parametrize("spread", [0.1, 3.0])  # top-p keeps more tokens than are sorted at first, or fewer
def test_filters_are_exact_on_a_large_vocabulary(spread: float) -> None:
    size = 4 * NUCLEUS
    kinds = [Sampling(top_p=0.7), Sampling(top_k=50, top_p=0.5), Sampling(top_k=2000), Sampling()]
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0)) * spread
    expected = [filtered(logits, sampling) for sampling in kinds]
    assert (len(expected[0]) > NUCLEUS) == (spread == 0.1)
    for chosen in (kinds, kinds[:1]):
        draw = Draw.of([(sampling, 5, 0) for sampling in chosen], size, torch.device("cpu"))
        for _ in range(50):
            for kept, token, logprob in zip(
                expected, *(x.tolist() for x in draw(logits.expand(len(chosen), size))), strict=False
            ):
                assert math.isclose(kept[token], math.exp(logprob), rel_tol=1e-4)


def test_a_nucleus_of_any_size_is_exact() -> None:
    size = 2 * WIDER * NUCLEUS
    spreads = torch.tensor([[3.0], [0.8], [0.05]])  # top-p keeps few tokens, more than are sorted at first, and most
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(0)) * spreads
    expected = [filtered(row, Sampling(top_p=0.7)) for row in logits]
    assert len(expected[0]) < NUCLEUS < len(expected[1]) < WIDER * NUCLEUS < len(expected[2])
    draw = Draw.of([(Sampling(top_p=0.7), seed, 0) for seed in range(3)], size, torch.device("cpu"))
    for _ in range(30):
        for kept, token, logprob in zip(expected, *(x.tolist() for x in draw(logits)), strict=True):
            assert math.isclose(kept[token], math.exp(logprob), rel_tol=1e-4)


def test_trees_of_different_sampling_share_a_batch() -> None:
    engine, plain = LocalEngine(prepared()), plain_model()
    kinds = [Sampling(temperature=0), Sampling(), Sampling(temperature=0.5), Sampling(top_k=2)]

    async def run() -> list[Segment]:
        handles = [await engine.open(Tree(PROMPTS[0]), sampling, []) for sampling in kinds]
        replies = await asyncio.gather(*(handle.generate(ROOT, 12, 7) for handle in handles))
        for handle in handles:
            handle.close()
        return replies

    together = asyncio.run(run())
    alone = [segment(LocalEngine(prepared()), PROMPTS[0], 12, 7, sampling) for sampling in kinds]
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    half = oracle(plain, PROMPTS[0] + together[2].tokens, 0.5)[-12:]
    assert torch.allclose(half, torch.tensor(together[2].logprobs), atol=1e-5)


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = p * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_draws_follow_the_softmax() -> None:
    n = 20_000
    logits = torch.linspace(-2, 2, V)
    draw = Draw.of([(Sampling(), seed, 0) for seed in range(n)], V, torch.device("cpu"))
    p = logits.double().softmax(-1)
    limit = 74.7  # 39 degrees of freedom: exceeded with probability 0.0005
    for _ in range(3):
        tokens, logprobs = draw(logits.expand(n, V))
        counts = torch.bincount(tokens, minlength=V).double()
        assert chi_square(counts, p) < limit
        assert chi_square(counts, (logits.double() * 1.1).softmax(-1)) > limit  # the mutant: another temperature
        assert torch.allclose(logprobs.exp().double(), p[tokens])


def test_uniforms_are_splitmix64() -> None:
    # First outputs for the seed 1234567, as in the public test vectors of the generator.
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    states = [(1234567 + gamma * i) & mask for i in range(1, 4)]
    got = uniform(torch.tensor([s - (1 << 64) if s >> 63 else s for s in states]))
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert got.tolist() == [(value >> 11) * 2.0**-53 for value in expected]


@pytest.mark.parametrize("size", [1, 40, 128, 129, 1000])
def test_inversion_equals_a_search_in_the_running_sum(size: int) -> None:
    torch.manual_seed(size)
    p = torch.rand(500, size) * (torch.rand(500, size) < 0.5)
    p[:, size // 2] += 0.1
    u = torch.rand(500, dtype=torch.float64)
    sums = p.double().cumsum(-1)
    tokens, total = invert(p, u)
    assert torch.allclose(total, sums[:, -1])
    assert torch.equal(tokens, torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)[:, 0])
    for edge in (0.0, 1 - 2.0**-53):  # the ends never leave the support
        tokens, _ = invert(p, torch.full((500,), edge, dtype=torch.float64))
        assert (p.gather(1, tokens[:, None]) > 0).all()


# ------------------------------------------------------------------------------------------------ entropies


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.6, top_k=3), Sampling(top_p=0.5), Sampling(temperature=0)]
)
@pytest.mark.parametrize("page", [2, 64])
def test_entropies_are_those_of_a_plain_forward_after_temperature_and_before_filters(
    sampling: Sampling, page: int
) -> None:
    plain, engine, tree = plain_model(), paged(page)(prepared(), LocalSettings(slots=3)), Tree(PROMPTS[0])

    async def run() -> list[Segment]:
        asks = await engine.open(tree, sampling, [], entropies=True)
        other = await engine.open(Tree(PROMPTS[2]), Sampling(temperature=2), [])  # shares the batch, and does not ask
        *replies, silent = await asyncio.gather(
            *(asks.generate(ROOT, n, n) for n in (3, 9, 5, 12)), other.generate(ROOT, 20, 1)
        )
        assert silent.entropies is None
        for handle in (asks, other):
            handle.close()
        return replies

    for reply in asyncio.run(run()):
        ids = torch.tensor([tree.prompt + reply.tokens])
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1].double()
        p = (logits / (sampling.temperature or 1.0)).softmax(-1)
        expected = -(p * p.log()).sum(-1)
        assert reply.entropies == pytest.approx(expected.tolist(), abs=1e-5)
        assert len(reply.entropies) == len(reply.tokens)


def test_tokens_that_cannot_be_drawn_add_no_entropy() -> None:
    draw = Draw.of([(Sampling(), 0, 0)], 4, torch.device("cpu"))
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert draw.entropies(logits).tolist() == pytest.approx([math.log(2)])


# ------------------------------------------------------------------------------------------------ ends


def test_any_of_several_stop_ids_ends_a_segment_as_its_last_token() -> None:
    free = segment(LocalEngine(prepared()), PROMPTS[0], 30, 3, Sampling())
    stops = {free.tokens[11], free.tokens[17]}
    end = min(free.tokens.index(stop) for stop in stops) + 1
    stopped = segment(LocalEngine(prepared()), PROMPTS[0], 30, 3, Sampling(), stops)
    assert stopped.tokens == free.tokens[:end]
    assert stopped.logprobs == pytest.approx(free.logprobs[:end], abs=1e-5)


def test_trees_with_and_without_stop_ids_share_a_batch() -> None:
    engine = LocalEngine(prepared())
    free = segment(engine, PROMPTS[0], 30, 3, Sampling()).tokens

    async def run() -> list[Segment]:
        handles = [await engine.open(Tree(PROMPTS[0]), Sampling(), stops) for stops in ([], [free[5]], [free[9]])]
        replies = await asyncio.gather(*(handle.generate(ROOT, 30, 3) for handle in handles))
        for handle in handles:
            handle.close()
        return replies

    assert [r.tokens for r in asyncio.run(run())] == [free] + [free[: free.index(free[i]) + 1] for i in (5, 9)]


@pytest.mark.parametrize("page", [4, 64])
def test_a_cancelled_call_frees_its_slot_and_harms_nobody(page: int) -> None:
    engine = paged(page)(prepared(), LocalSettings(slots=2))

    async def run() -> None:
        tree = Tree(PROMPTS[0])
        handle = await engine.open(tree, Sampling(), [])
        calls = [asyncio.create_task(handle.generate(ROOT, 40, seed)) for seed in range(4)]
        await until(lambda: engine.stats.steps >= 5)
        calls[0].cancel()  # decoding
        calls[3].cancel()  # waiting
        replies = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(reply) for reply in replies] == [asyncio.CancelledError, Segment, Segment, asyncio.CancelledError]
        again = await handle.generate(ROOT, 40, 0)  # a seed may be tried again
        for reply in (replies[1], replies[2], again):
            expected = oracle(plain_model(), tree.prompt + reply.tokens)[-40:]
            assert torch.allclose(expected, torch.tensor(reply.logprobs), atol=1e-5)
        handle.close()

    asyncio.run(run())
    assert engine.stats.decoded_tokens < 4 * 40


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_closing_cancels_what_is_under_way() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        handles = [await engine.open(Tree(PROMPTS[0]), Sampling(), []) for _ in range(2)]
        calls = [asyncio.create_task(handle.generate(ROOT, 60, 1)) for handle in handles]
        await until(lambda: engine.stats.steps >= 3)
        handles[0].close()
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        assert len((await calls[1]).tokens) == 60
        handles[1].close()
        handles[1].close()

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ life


def test_later_segments_follow_the_new_weights_in_another_event_loop() -> None:
    model = prepared()
    engine = LocalEngine(model)
    assert forest(engine)[0].nodes[1].version == 0
    plain = plain_model(seed=1)
    model.load_state_dict(plain.state_dict())
    asyncio.run(engine.load_weights(7))
    tree = forest(engine)[0]
    assert {node.version for node in tree.nodes[1:]} == {7}
    assert worst_error(plain, tree) < 1e-5
    assert worst_error(plain_model(seed=0), tree) > 1e-2


def test_weights_do_not_change_under_an_open_tree() -> None:
    engine = LocalEngine(prepared())
    asyncio.run(engine.open(Tree([1, 2]), Sampling(), []))
    with pytest.raises(RuntimeError, match="1 trees are open"):
        asyncio.run(engine.load_weights(1))


def test_a_module_in_training_decodes_without_dropout_and_stays_as_it_was() -> None:
    expected = segment(LocalEngine(prepared()), PROMPTS[0], 10, 1, Sampling())
    model = prepared()
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, output: torch.nn.functional.dropout(output, 0.5, module.training)
    )
    engine = LocalEngine(model)
    model.train()
    model.model.norm.eval()
    reply = segment(engine, PROMPTS[0], 10, 1, Sampling())
    assert reply == expected
    assert model.training and model.model.layers[0].training and not model.model.norm.training
    ids = torch.tensor([PROMPTS[0]])
    plan = causal_lm.Causal()
    causal_lm.hidden(model, ids, torch.arange(ids.shape[1])[None], plan).sum().backward()  # nothing is left behind


def test_requests_that_cannot_fit_say_so() -> None:
    engine = LocalEngine(prepared(), LocalSettings(max_tokens=16))
    assert engine.context == 16

    async def run() -> None:
        with pytest.raises(EngineError, match=r"20 tokens.*16.*engine\.max_tokens"):
            await engine.open(Tree([1] * 20), Sampling(), [])
        with pytest.raises(ConfigError, match=r"stop ids \[40\]"):
            await engine.open(Tree([1]), Sampling(), [1, 40])
        handle = await engine.open(Tree([1] * 10), Sampling(), [])
        with pytest.raises(EngineError, match=r"10 tokens of prefix and max_tokens=7 exceed 16"):
            await handle.generate(ROOT, 7, 1)
        assert len((await handle.generate(ROOT, 6, 1)).tokens) == 6
        handle.close()

    asyncio.run(run())


def test_a_seed_names_one_segment_of_a_tree() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        tree = Tree(PROMPTS[0])
        handle = await engine.open(tree, Sampling(), [])
        (node,) = await extend(tree, handle, (ROOT, 3, 1))
        with pytest.raises(ValueError, match="seed 1 already"):
            await handle.generate(node, 3, 1)
        handle.close()

    asyncio.run(run())


class Failing(LocalEngine):
    """Raises `error`, if there is one, instead of decoding."""

    error: Exception | None = None

    def _step(self) -> bool:
        if self.error is not None:
            raise self.error
        return super()._step()


@pytest.mark.parametrize(
    ("error", "seen", "text"),
    [
        (KeyError("bug"), KeyError, "bug"),
        (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
        (torch.OutOfMemoryError("no memory"), EngineError, r"lower engine\.slots"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), EngineError, r"lower engine\.slots"),
    ],
)
def test_an_error_reaches_everyone_who_waits_and_the_engine_lives_on(error: Exception, seen: Any, text: str) -> None:
    engine = Failing(prepared(), LocalSettings(slots=2))

    async def run() -> None:
        handle = await engine.open(Tree(PROMPTS[0]), Sampling(), [])
        engine.error = error
        calls = [asyncio.create_task(handle.generate(ROOT, 5, seed)) for seed in range(5)]
        await asyncio.wait(calls)
        for call in calls:
            with pytest.raises(seen, match=text):
                call.result()
        engine.error = None
        assert len((await handle.generate(ROOT, 5, 1)).tokens) == 5
        handle.close()

    asyncio.run(run())


def test_logits_that_are_not_finite_fail_the_segment() -> None:
    model = prepared()
    engine = LocalEngine(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(EngineError, match="not finite"):
        segment(engine, PROMPTS[0], 5, 1, Sampling())


def test_a_model_without_the_seam_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"treepo\.model\.prepare"):
        LocalEngine(plain_model())


def test_an_event_loop_that_died_under_way_does_not_block_the_next() -> None:
    engine, lost = LocalEngine(prepared()), []

    async def leave() -> None:
        handle = await engine.open(Tree(PROMPTS[0]), Sampling(), [])
        lost.append(asyncio.create_task(handle.generate(ROOT, 60, 1)))
        await until(lambda: engine.stats.steps >= 3)

    asyncio.run(leave())
    assert len(segment(engine, PROMPTS[2], 10, 1, Sampling()).tokens) == 10
