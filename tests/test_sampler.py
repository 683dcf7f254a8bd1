"""Algorithm 1 on the scripted engine: budgets, prefixes, seeds, failures."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scripted_trees import EOS, mixed, mixed_reply, never_ends, sampler
from treepo.engines import Sampling
from treepo.engines.scripted import ScriptedEngine, random_reply
from treepo.errors import EngineError
from treepo.policies.branching import LevelBudget
from treepo.policies.fallback import GridBoundary, LowestLogProb, NoFallback, Restart, SegmentBoundary, WeightedBlock
from treepo.policies.stopping import EarlyStop
from treepo.sampler import Sampler, SamplerSettings
from treepo.seeds import generator
from treepo.tree import ROOT, Stop, Tree

candidates = {
    "candidates": st.sampled_from(["ended", "answered", "any"]),
    "order": st.sampled_from(["random", "answered_first", "longest_first"]),
    "min_tokens": st.integers(0, 9),
}
fallbacks = st.one_of(
    st.builds(SegmentBoundary, **candidates),
    st.builds(GridBoundary, window=st.integers(1, 9), **candidates),
    st.builds(WeightedBlock, window=st.integers(1, 9), prefer=st.sampled_from(["low", "high"]), **candidates),
    st.builds(LowestLogProb, **candidates),
    st.just(Restart()),
    st.just(NoFallback()),
)
shapes = st.fixed_dictionaries(
    {
        "width": st.integers(1, 20),
        "segment_tokens": st.integers(1, 9),
        "max_depth": st.integers(1, 6),
        "mode": st.sampled_from(["tree", "tree", "tree", "iid"]),
        "token_budget": st.one_of(st.none(), st.none(), st.integers(1, 400)),
        "branching": st.builds(
            LevelBudget,
            divergence=st.one_of(st.integers(1, 4), st.just((1, 3)), st.just("spread")),
            first_divergence=st.one_of(st.integers(1, 9), st.just((2, 8)), st.none()),
            start=st.integers(0, 4),
            every=st.integers(1, 3),
            transfer=st.booleans(),
            allocation=st.sampled_from(["uniform", "low_prob", "high_prob", "entropy"]),
            over=st.sampled_from(["segment", "path", "path_sum"]),
            temperature=st.sampled_from([2.0, 1e-4, (5.0, 1.0)]),
        ),
        "stopping": st.builds(
            EarlyStop,
            answer=st.sampled_from(["alone", "with_eos", "ignored"]),
            stop_strings=st.sampled_from([(), ("ab",)]),
        ),
        "trim": st.booleans(),
        "fallback": fallbacks,
    }
)


@settings(max_examples=400, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(0, 99), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_same_seed_grows_the_same_tree_within_its_budgets_in_whatever_order_replies_come(
    shape: dict, seed: int, order: int, failure_rate: float, progress: float
) -> None:
    asked: dict[int, list[int]] = {}

    def recorded(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        asked[seed] = list(prefix)
        return mixed(seed, max_tokens)

    prompts = [(f"q{i}", [2, 3, 4][: i + 1]) for i in range(3)]
    plain = ScriptedEngine(recorded, failure_rate=failure_rate)
    grow = sampler(plain, **shape)
    trees = grow.sample(prompts, seed, progress=progress)
    shuffled = ScriptedEngine(mixed_reply, shuffle=order, failure_rate=failure_rate)
    assert sampler(shuffled, **shape).sample(prompts, seed, progress=progress) == trees
    assert plain.open_trees == shuffled.open_trees == 0
    for tree in trees:
        leaves = tree.leaves()
        assert 1 <= len(leaves) <= shape["width"]
        if shape["mode"] == "iid" or (shape["token_budget"] is None and not isinstance(shape["fallback"], NoFallback)):
            assert len(leaves) == shape["width"]
        if not isinstance(shape["fallback"], NoFallback):
            lengths = [tree.response_length(leaf) for leaf in leaves if tree.nodes[leaf].stop is not Stop.ERROR]
            assert len(leaves) >= grow.settings.wanted(lengths), "it ends only when it owes no leaf"
        assert Tree.from_json(tree.to_json()) == tree  # from_json checks that childless <=> finished
        segments = set()
        for node in tree.nodes[1:]:
            assert node.depth <= shape["max_depth"]
            if node.seed == tree.nodes[node.parent].seed:
                continue  # the second half of a segment
            assert node.seed not in segments, "a seed names one segment"
            segments.add(node.seed)
            if node.stop is not Stop.ERROR:
                assert asked[node.seed] == tree.tokens(node.parent), "it continues exactly its own prefix"
        for leaf in leaves:
            assert tree.response_length(leaf) <= shape["segment_tokens"] * shape["max_depth"]


def test_another_seed_or_key_grows_another_tree() -> None:
    grow = sampler(ScriptedEngine(mixed_reply)).sample
    (tree,) = grow([("a", [2])], 0)
    assert grow([("a", [2])], 1) != [tree]
    (other,) = grow([("b", [2])], 0)
    assert other.nodes != tree.nodes


def test_every_segment_continues_exactly_its_own_prefix() -> None:
    """The released code conditions on the old, longer prefix after a fallback."""

    def echo(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        ending = [EOS] if generator(seed).random() < 0.5 else []
        return [2 + (sum(prefix) * 31 + len(prefix)) % 8, 2 + seed % 8, *ending]

    trees = sampler(ScriptedEngine(echo), width=12).sample([(str(i), [3]) for i in range(20)], 0)
    fell_back = 0
    for tree in trees:
        for node in tree.nodes[1:]:
            prefix = tree.tokens(node.parent)
            assert node.tokens[0] == 2 + (sum(prefix) * 31 + len(prefix)) % 8
        fell_back += any(len(children) > 2 for children in tree.children[1:])
    assert fell_back > 5, "the test wants trees that fell back"


def test_iid_mode_is_a_star_of_whole_responses() -> None:
    (tree,) = sampler(ScriptedEngine(never_ends), mode="iid").sample([("q", [2])], 0)
    assert len(tree.children[ROOT]) == 8 == len(tree.leaves())
    assert {len(n.tokens) for n in tree.nodes[1:]} == {20} and tree.unique_tokens == tree.flat_tokens


# A budget of tokens in place of leaves --------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(2, 16), st.integers(1, 6))
def test_aligned_segments_end_one_token_past_a_block(prompt: int, segment: int, block: int, depth: int) -> None:
    shape = SamplerSettings(
        width=5, segment_tokens=segment, max_depth=depth, align_segments=True, stopping=EarlyStop(repetition_count=0)
    )
    engine = ScriptedEngine(random_reply(9), granularity=block)
    (tree,) = Sampler(engine, shape, str, ()).sample([("q", [1] * prompt)], seed=0)
    assert len(tree.leaves()) == 5
    for node in tree.nodes[1:]:
        end = node.start + len(node.tokens)
        over = (prompt + tree.response_length(node.parent) + segment - 1) % block
        last = tree.response_length(node.parent) + segment >= segment * depth
        assert len(node.tokens) <= segment and (last or (end - 1) % block == 0 or over >= segment)
    plain = ScriptedEngine(random_reply(9), granularity=block)
    loose = Sampler(plain, shape.model_copy(update={"align_segments": False}), str, ())
    assert all(len(node.tokens) == segment for node in loose.sample([("q", [1] * prompt)], seed=0)[0].nodes[1:])


def test_a_token_budget_asks_for_as_many_leaves_as_make_it_up_judged_by_their_mean_length() -> None:
    shape = SamplerSettings(width=10, min_width=2, token_budget=100, segment_tokens=5, max_depth=4)
    assert shape.wanted([]) == 5, "as long as they may be, 20 tokens, while none is known"
    assert shape.wanted([10, 20]) == 6 and shape.wanted([1]) == 10 and shape.wanted([90]) == 2
    assert SamplerSettings(width=10).wanted([90]) == 10
    assert shape.model_copy(update={"mode": "iid"}).wanted([90]) == 10, "independent responses are counted"


@pytest.mark.parametrize("fallback", [SegmentBoundary(), Restart()])
def test_a_tree_with_a_token_budget_ends_near_it_whether_its_leaves_are_long_or_short(fallback) -> None:
    def length(long: bool) -> tuple[float, set[int]]:
        def reply(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
            end = 0.1 if long else 0.6
            return [EOS] if generator(seed, "end").random() < end else never_ends(prefix, max_tokens, seed)

        shape = {"width": 40, "min_width": 3, "token_budget": 160, "fallback": fallback}
        trees = sampler(ScriptedEngine(reply), **shape).sample([(str(i), [2]) for i in range(40)], 0)
        widths = {len(tree.leaves()) for tree in trees}
        assert min(widths) >= 3 and max(widths) <= 40
        return sum(tree.flat_tokens for tree in trees) / len(trees), widths

    long, short = length(True), length(False)
    assert 130 < long[0] < 220 and 130 < short[0] < 220
    assert max(long[1]) < max(short[1]) and len(short[1]) > 3


def test_failed_leaves_say_nothing_about_lengths() -> None:
    grow = sampler(ScriptedEngine(never_ends, failure_rate=1.0), width=8, token_budget=60)
    (tree,) = grow.sample([("q", [2])], 0)
    assert len(tree.leaves()) == 3, "as many responses of 20 tokens as are sure to fit"


def test_the_fewest_leaves_of_a_token_budget_cannot_be_more_than_the_most() -> None:
    with pytest.raises(ValueError, match="min_width 9 is above width 8"):
        SamplerSettings(width=8, min_width=9, token_budget=10)


# Failures -------------------------------------------------------------------------------------------------------------


def test_failed_requests_are_sent_again_then_cost_their_leaf_only() -> None:
    prompts = [(str(i), [2]) for i in range(50)]

    def lost(retries: int) -> int:
        engine = ScriptedEngine(mixed_reply, failure_rate=0.1)
        trees = sampler(engine, width=16, retries=retries).sample(prompts, 0)
        assert all(len(tree.leaves()) == 16 for tree in trees)
        return sum(tree.nodes[leaf].stop is Stop.ERROR for tree in trees for leaf in tree.leaves())

    assert lost(0) > 100 > lost(1) > lost(3) == 0


def test_an_engine_that_always_fails_gives_trees_of_error_leaves() -> None:
    grow = sampler(ScriptedEngine(mixed_reply, failure_rate=1.0))
    (tree,) = grow.sample([("q", [2])], 0)
    assert [tree.nodes[leaf].stop for leaf in tree.leaves()] == [Stop.ERROR] * 8
    assert tree.flat_tokens == 0
    assert all("attempt 3" in tree.nodes[leaf].error for leaf in tree.leaves())


def test_a_bug_in_an_engine_is_not_swallowed_and_every_tree_is_closed() -> None:
    def broken(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        raise ZeroDivisionError("a bug")

    engine = ScriptedEngine(broken, shuffle=0)
    with pytest.raises(ZeroDivisionError):
        sampler(engine).sample([(str(i), [2]) for i in range(5)], 0)
    assert engine.open_trees == 0


def test_trees_are_reported_as_they_are_complete_and_returned_in_order() -> None:
    def short_or_long(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [EOS] if prefix[0] == 9 else never_ends(prefix, max_tokens, seed)

    seen: list[int] = []
    grow = sampler(ScriptedEngine(short_or_long), width=4)
    trees = grow.sample([("slow", [2]), ("quick", [9])], 0, on_tree=lambda i, _: seen.append(i))
    assert seen == [1, 0] and [tree.key for tree in trees] == ["slow", "quick"]


def test_the_scripted_engine_replies_by_prefix_and_seed_alone() -> None:
    async def ask(engine: ScriptedEngine, seed: int) -> list[int]:
        handle = await engine.open(Tree([2, 3]), Sampling(), {EOS})
        return (await handle.generate(ROOT, 6, seed)).tokens

    engine = ScriptedEngine(random_reply(50))
    assert asyncio.run(ask(engine, 5)) == asyncio.run(ask(engine, 5)) != asyncio.run(ask(engine, 6))
    with pytest.raises(EngineError, match="scripted failure"):
        asyncio.run(ask(ScriptedEngine(random_reply(50), failure_rate=1.0), 5))
