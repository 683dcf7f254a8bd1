"""Algorithm 1 on the scripted engine: budgets, stops, fallback, seeds, failures."""

import asyncio
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo.engines import Sampling
from treepo.engines.scripted import ScriptedEngine, random_reply
from treepo.errors import EngineError
from treepo.policies.branching import Uniform
from treepo.policies.fallback import SegmentBoundary
from treepo.policies.stopping import EarlyStop
from treepo.sampler import Sampler, SamplerSettings
from treepo.seeds import generator
from treepo.tree import ROOT, Stop, Tree

EOS = 1
ALPHABET = "$^abcdefgh{}\\boxe"


def decode(tokens: Sequence[int]) -> str:
    return "".join(ALPHABET[t % len(ALPHABET)] for t in tokens if t != EOS)


def encode(text: str) -> list[int]:
    return [ALPHABET.index(c) for c in text]


def sampler(engine: ScriptedEngine, stop_ids: Sequence[int] = (EOS,), **given) -> Sampler:
    shape = {"width": 8, "segment_tokens": 4, "max_depth": 5} | given
    return Sampler(engine, SamplerSettings(**shape), decode, stop_ids)


def mixed(seed: int, max_tokens: int) -> list[int]:
    """Letters, with an EOS here and there and, rarely, a box."""
    rng = generator(seed)
    if rng.random() < 0.1:
        return encode("\\boxed{a}"[:max_tokens])
    return [EOS if rng.random() < 0.06 else rng.randrange(2, 10) for _ in range(max_tokens)]


def mixed_reply(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
    return mixed(seed, max_tokens)


shapes = st.fixed_dictionaries(
    {
        "width": st.integers(1, 20),
        "segment_tokens": st.integers(1, 9),
        "max_depth": st.integers(1, 6),
        "mode": st.sampled_from(["tree", "tree", "iid"]),
        "branching": st.builds(
            Uniform,
            divergence=st.integers(1, 4),
            first_divergence=st.one_of(st.integers(1, 9), st.just((2, 8))),
        ),
        "stopping": st.builds(EarlyStop, answer=st.sampled_from(["alone", "with_eos"])),
    }
)


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(0, 99), st.sampled_from([0.0, 0.1]))
def test_the_same_seed_grows_the_same_tree_of_exactly_width_leaves_in_whatever_order_replies_come(
    shape: dict, seed: int, order: int, failure_rate: float
) -> None:
    prompts = [(f"q{i}", [2, 3, 4][: i + 1]) for i in range(3)]
    plain = ScriptedEngine(mixed_reply, failure_rate=failure_rate)
    trees = sampler(plain, **shape).sample(prompts, seed)
    shuffled = ScriptedEngine(mixed_reply, shuffle=order, failure_rate=failure_rate)
    assert sampler(shuffled, **shape).sample(prompts, seed) == trees
    assert plain.open_trees == shuffled.open_trees == 0
    for tree in trees:
        assert len(tree.leaves()) == shape["width"]
        assert Tree.from_json(tree.to_json()) == tree  # from_json checks that childless <=> finished
        names = [node.seed for node in tree.nodes]
        assert len(set(names)) == len(names), "a seed names one segment"
        for leaf in tree.leaves():
            assert tree.response_length(leaf) <= shape["segment_tokens"] * shape["max_depth"]
            assert tree.nodes[leaf].depth <= shape["max_depth"]


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


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30), st.integers(1, 8), st.integers(0, 999))
def test_a_levels_budget_is_the_papers(active: int, finished: int, spare: int, divergence: int, seed: int) -> None:
    remaining = active + spare
    policy = Uniform(divergence=divergence)
    shares = policy(Tree([0]), range(active), finished, remaining, Random(seed), 0.0)
    assert sum(shares) == max(active, min(remaining, divergence * finished + divergence * active))
    assert min(shares) >= 1 and max(shares) - min(shares) <= 1


def test_the_remainder_goes_to_random_paths_not_always_to_the_last() -> None:
    shares = [Uniform()(Tree([0]), range(4), 0, 6, Random(seed), 0.0) for seed in range(50)]
    lucky = {i for share in shares for i, children in enumerate(share) if children == 2}
    assert lucky == {0, 1, 2, 3}


def never_ends(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
    return [2 + (seed >> i) % 8 for i in range(max_tokens)]


def test_the_first_divergence_takes_effect_fixed_or_drawn_and_never_exceeds_the_width() -> None:
    def opened(width: int, first: int | tuple[int, int]) -> set[int]:
        grow = sampler(ScriptedEngine(never_ends), width=width, branching=Uniform(first_divergence=first))
        return {len(t.children[ROOT]) for t in grow.sample([(str(i), [2]) for i in range(60)], 0)}

    assert opened(16, 3) == {3}
    assert opened(16, (2, 8)) == {2, 3, 4, 5, 6, 7, 8}
    assert opened(4, (2, 8)) == {2, 3, 4}


def test_doubling_stops_at_the_width() -> None:
    grow = sampler(ScriptedEngine(never_ends), width=8, branching=Uniform(first_divergence=2))
    (tree,) = grow.sample([("q", [2])], 0)
    per_level = [sum(n.depth == d for n in tree.nodes) for d in range(1, 6)]
    assert per_level == [2, 4, 8, 8, 8]
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {Stop.LENGTH}
    assert tree.unique_tokens == 4 * 30 and tree.flat_tokens == 4 * 40


def test_the_budget_of_finished_paths_is_transferred_to_those_alive() -> None:
    def first_child_ends(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [EOS] if len(prefix) == 1 and seed == doomed else never_ends(prefix, max_tokens, seed)

    probe = sampler(ScriptedEngine(never_ends), width=8, branching=Uniform(first_divergence=2))
    (tree,) = probe.sample([("q", [2])], 0)
    doomed = tree.nodes[tree.children[ROOT][0]].seed
    grow = sampler(ScriptedEngine(first_child_ends), width=8, branching=Uniform(first_divergence=2))
    (tree,) = grow.sample([("q", [2])], 0)
    per_level = [sum(n.depth == d for n in tree.nodes) for d in range(1, 4)]
    assert per_level == [2, 4, 7], "2 alive children would open 2, with the transfer they open 4, then 7 are owed"


def test_iid_mode_is_a_star_of_whole_responses() -> None:
    (tree,) = sampler(ScriptedEngine(never_ends), mode="iid").sample([("q", [2])], 0)
    assert len(tree.children[ROOT]) == 8 == len(tree.leaves())
    assert {len(n.tokens) for n in tree.nodes[1:]} == {20} and tree.unique_tokens == tree.flat_tokens


# Stopping -------------------------------------------------------------------------------------------------------------


def judge(text: str, policy: EarlyStop | None = None, *, eos=False, length=False, depth=False) -> Stop | None:
    return (policy or EarlyStop())(lambda: text, eos=eos, length=length, depth=depth)


def test_stops_are_checked_in_the_papers_order() -> None:
    assert judge("\\boxed{1}", eos=True, length=True, depth=True) is Stop.ANSWER
    assert judge("no box", eos=True, length=True, depth=True) is Stop.EOS
    assert judge("no box", length=True, depth=True) is Stop.LENGTH
    assert judge("a" * 99, depth=True) is Stop.DEPTH
    assert judge("a" * 99) is Stop.REPETITION
    assert judge("going on") is None


def test_a_box_ends_the_path_when_closed_nested_braces_included() -> None:
    assert judge("\\boxed{\\frac{1}{2}") is None
    assert judge("\\boxed{\\frac{1}{2}}") is Stop.ANSWER


def test_answer_with_eos_goes_on_after_a_box_without_eos() -> None:
    rule = EarlyStop(answer="with_eos")
    assert judge("\\boxed{1}", rule) is None
    assert judge("\\boxed{1}", rule, eos=True) is Stop.ANSWER
    assert judge("\\boxed{1", rule, eos=True) is Stop.EOS


def test_a_box_that_straddles_segments_is_seen() -> None:
    text = encode("ab\\boxed{c}") + [2] * 20

    def scripted(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return text[len(prefix) - 1 :][:max_tokens]

    (tree,) = sampler(ScriptedEngine(scripted), width=2, max_depth=8).sample([("q", [2])], 0)
    for leaf in tree.leaves():
        assert tree.nodes[leaf].stop is Stop.ANSWER and tree.response_length(leaf) == 12


def test_repetition_counts_substrings_of_the_whole_response_with_both_numbers_as_settings() -> None:
    unit = "0123456789abcdefghijklmnopqrstuv"
    assert judge(unit * 7 + "x") is None and judge(unit * 8) is Stop.REPETITION
    assert judge("abc" * 3, EarlyStop(repetition_chars=3, repetition_count=3)) is Stop.REPETITION
    assert judge("abc" * 3, EarlyStop(repetition_chars=3, repetition_count=4)) is None
    assert judge(unit * 50, EarlyStop(repetition_count=0)) is None


def test_known_false_positive_a_long_rule_of_dashes_counts_as_repetition() -> None:
    assert judge("| a | b |\n" + "-" * 38) is None
    assert judge("| a | b |\n" + "-" * 39) is Stop.REPETITION


@pytest.mark.parametrize("stop_ids", [(EOS,), (17, EOS)])
def test_any_eos_id_ends_a_path_also_as_a_segments_first_token(stop_ids) -> None:
    def scripted(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [EOS] if len(prefix) >= 5 else [3] * max_tokens

    (tree,) = sampler(ScriptedEngine(scripted), stop_ids, width=4).sample([("q", [2])], 0)
    for leaf in tree.leaves():
        assert tree.nodes[leaf].stop is Stop.EOS and tree.nodes[leaf].tokens == [EOS]


def test_flawed_paths_are_kept_as_leaves() -> None:
    def loop(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [3] * max_tokens

    (tree,) = sampler(ScriptedEngine(loop), segment_tokens=20, max_depth=9).sample([("q", [2])], 0)
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {Stop.REPETITION} and len(tree.leaves()) == 8


# Fallback -------------------------------------------------------------------------------------------------------------


def chain(stop: Stop, segments: int = 4) -> Tree:
    tree, node = Tree([2]), ROOT
    for i in range(segments):
        node = tree.add(node, [3] * 4, [0.0] * 4, seed=i, stop=stop if i == segments - 1 else None)
    return tree


def test_fallback_draws_every_boundary_but_the_end_uniformly() -> None:
    tree = chain(Stop.EOS)
    drawn = [SegmentBoundary()(tree, [4], 1, Random(seed)) for seed in range(4000)]
    counts = {kept: sum(places == [(4, kept)] for places in drawn) for kept in (0, 4, 8, 12, 16)}
    assert counts[16] == 0 and sum(counts.values()) == 4000
    assert all(900 < counts[kept] < 1100 for kept in (0, 4, 8, 12))


@pytest.mark.parametrize("stop", [Stop.LENGTH, Stop.DEPTH, Stop.REPETITION, Stop.ERROR])
def test_paths_that_did_not_end_well_are_no_candidates_and_the_tree_restarts_from_its_root(stop: Stop) -> None:
    assert SegmentBoundary()(chain(stop), [4], 3, Random(0)) == [(4, 0)]


def test_a_dry_tree_falls_back_with_at_most_divergence_children_each_until_the_width_is_reached() -> None:
    def ends_at_once(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [3, 4, EOS] if len(prefix) > 8 else [3] * max_tokens

    one = Uniform(divergence=2, first_divergence=1)
    (tree,) = sampler(ScriptedEngine(ends_at_once), width=7, branching=one).sample([("q", [2])], 0)
    assert len(tree.leaves()) == 7


class AnyToken(SegmentBoundary):
    """A fallback of another kind: cut a finished path anywhere, also inside a segment."""

    def __call__(self, tree: Tree, finished: Sequence[int], wanted: int, rng: Random) -> list[tuple[int, int]]:
        leaves = [leaf for leaf in finished if tree.response_length(leaf)]
        return [(leaf, rng.randrange(tree.response_length(leaf))) for leaf in rng.sample(leaves, 1)]


def test_a_fallback_may_cut_inside_a_segment() -> None:
    def echo(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [2 + (sum(prefix) * 31 + len(prefix)) % 8, 2 + seed % 8, 2 + seed % 7, EOS]

    grow = sampler(ScriptedEngine(echo), width=24, segment_tokens=6)
    grow = Sampler(grow.engine, grow.settings.model_copy(update={"fallback": AnyToken()}), decode, (EOS,))
    halves = 0
    for tree in grow.sample([(str(i), [3]) for i in range(20)], 0):
        assert len(tree.leaves()) == 24 and Tree.from_json(tree.to_json()) == tree
        places = {(node.seed, node.start) for node in tree.nodes}
        assert len(places) == len(tree), "only the halves of a split node share a seed"
        segments = {}
        for index, node in enumerate(tree.nodes[1:], 1):
            if node.seed != tree.nodes[node.parent].seed:  # the first part of a segment
                prefix = tree.tokens(node.parent)
                assert node.tokens[0] == 2 + (sum(prefix) * 31 + len(prefix)) % 8
                assert node.seed not in segments, "a seed names one segment"
                segments[node.seed] = index
            else:
                halves += 1
    assert halves > 50


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
    assert set(grow.failures) == {("q", leaf) for leaf in tree.leaves()}
    assert all("attempt 3" in why for why in grow.failures.values())


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
