"""Where a dry tree goes on: positions, candidates, cuts inside a segment, and classes of the user's own."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.local_models import plain_model, prepared, with_room, worst_error
from tests.support.scripted_trees import EOS, chain, encode, frontier, mixed_reply, sampler
from treepo.engines.local.engine import LocalEngine
from treepo.engines.scripted import ScriptedEngine
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError
from treepo.policies import Frontier
from treepo.policies.branching import LevelBudget
from treepo.policies.fallback import (
    CutBack,
    Fallback,
    GridBoundary,
    LowestLogProb,
    NoFallback,
    Restart,
    SegmentBoundary,
    WeightedBlock,
)
from treepo.policies.stopping import EarlyStop
from treepo.sampler import Sampler, SamplerSettings
from treepo.seeds import generator
from treepo.tree import ROOT, Stop, Tree

QUERIES = [(str(i), [3]) for i in range(20)]
SEGMENT = [-1.0] * 4


def places(policy: Fallback, tree: Tree, draws: int = 2000, wanted: int = 1, levels: int = 5) -> Counter[object]:
    """How often each answer is drawn for a dry tree of which all leaves are candidates to look at."""
    return Counter(
        tuple(policy(frontier(tree, [], tree.leaves(), seed=seed, levels=levels), wanted)) for seed in range(draws)
    )


def kept(policy: Fallback, tree: Tree, **more: int) -> dict[int, int]:
    """How often so many tokens are kept of the only leaf."""
    (leaf,) = tree.leaves()
    found = places(policy, tree, **more)
    assert all(leaf_ == leaf for ((leaf_, _),) in found)
    return {n: count for ((_, n),), count in found.items()}


def flat(counts: dict[int, int]) -> bool:
    expected = sum(counts.values()) / len(counts)
    return all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


# Positions ------------------------------------------------------------------------------------------------------------


def test_a_segment_boundary_is_drawn_uniformly_and_the_last_segment_is_always_cut() -> None:
    drawn = kept(SegmentBoundary(), chain(Stop.EOS, *[SEGMENT] * 4))
    assert set(drawn) == {0, 4, 8, 12} and flat(drawn)


def test_a_grid_boundary_is_a_multiple_of_its_window_before_the_end() -> None:
    tree = chain(Stop.EOS, *[SEGMENT] * 3)
    drawn = kept(GridBoundary(window=3), tree)
    assert set(drawn) == {0, 3, 6, 9} and flat(drawn)
    assert set(kept(GridBoundary(window=12), tree)) == {0}
    assert set(kept(GridBoundary(window=5), tree)) == {0, 5, 10}


def test_the_root_is_a_place_of_its_own() -> None:
    assert kept(Restart(), chain(Stop.EOS, *[SEGMENT] * 4)) == {0: 2000}


def test_the_least_likely_token_is_the_first_to_be_cut() -> None:
    tree = chain(Stop.EOS, [-1.0, -2.0, -0.5, -1.0], [-1.0, -9.0, -9.0, -1.0])
    assert set(kept(LowestLogProb(), tree, draws=9)) == {5}
    assert set(kept(LowestLogProb(), chain(Stop.EOS, [-3.0, -1.0]), draws=9)) == {0}


def test_a_block_is_drawn_by_its_mean_log_prob_low_or_high() -> None:
    tree = chain(Stop.EOS, [-1.0, -1.0, -3.0], [-3.0, -2.0])  # blocks of two: -1, -3, and the last one -2

    def shares(**given: object) -> dict[int, float]:
        return {
            start: count / 20000 for start, count in kept(WeightedBlock(window=2, **given), tree, draws=20000).items()
        }

    total = sum(math.exp(x) for x in (1, 2, 3))
    low = {start: math.exp(x) / total for start, x in ((0, 1), (2, 3), (4, 2))}
    assert shares() == pytest.approx(low, abs=0.02)
    high = {start: math.exp(-x) / sum(math.exp(-y) for y in (1, 2, 3)) for start, x in ((0, 1), (2, 3), (4, 2))}
    assert shares(prefer="high") == pytest.approx(high, abs=0.02)
    assert shares(temperature=1e6) == pytest.approx({0: 1 / 3, 2: 1 / 3, 4: 1 / 3}, abs=0.02)


def test_without_a_fallback_a_dry_tree_stays_as_it_is() -> None:
    shape = {"width": 16, "branching": LevelBudget(divergence=1, first_divergence=3, transfer=False)}
    dry = sampler(ScriptedEngine(mixed_reply), fallback=NoFallback(), **shape).sample(QUERIES, 0)
    assert {len(tree.leaves()) for tree in dry} == {3}
    full = sampler(ScriptedEngine(mixed_reply), **shape).sample(QUERIES, 0)
    assert {len(tree.leaves()) for tree in full} == {16}


CUTS = [SegmentBoundary(), GridBoundary(window=3), LowestLogProb(), WeightedBlock(window=2)]


@pytest.mark.parametrize("policy", CUTS, ids=lambda policy: policy.kind)
def test_another_segment_always_fits_into_the_depth(policy: CutBack) -> None:
    tree = chain(Stop.EOS, [-1.0] * 4, [-1.0] * 4, [-9.0] * 4)
    assert max(kept(policy, tree, levels=3)) <= 8, "a cut in the third segment would make a fourth"
    assert set(kept(policy, chain(Stop.EOS, [-1.0, -9.0]), levels=1)) == {0}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 2), st.integers(0, 9))
def test_the_longest_that_can_be_kept_ends_before_the_last_token_and_the_last_level(
    lengths: list[int], spare: int, at: int
) -> None:
    tree = chain(Stop.EOS, *[[-1.0] * n for n in lengths])
    (leaf,) = tree.leaves()
    if 0 < at < len(tree.nodes[leaf].tokens):
        tree.split(leaf, at)
    longest = frontier(tree, [], [leaf], levels=len(lengths) + spare).longest(leaf)
    assert longest == (sum(lengths) - 1 if spare else sum(lengths[:-1]))
    assert tree.nodes[tree.node_after(leaf, longest)].depth < len(lengths) + spare


# Candidates -----------------------------------------------------------------------------------------------------------


def leaves(*stops: Stop, lengths: Sequence[int] = ()) -> Tree:
    """A leaf for every stop, each a path of two segments of its own."""
    tree = Tree([2])
    for i, stop in enumerate(stops):
        node = tree.add(ROOT, [3], [-1.0], seed=2 * i)
        length = lengths[i] if lengths else 1
        tokens = [] if stop is Stop.ERROR else [3] * length
        tree.add(node, tokens, [-1.0] * len(tokens), seed=2 * i + 1, stop=stop)
    return tree


def taken(policy: Fallback, tree: Tree, wanted: int = 1, draws: int = 2000) -> Counter[tuple[Stop | None, ...]]:
    """How often leaves with these stops are taken, in that order."""
    return Counter(
        tuple(tree.nodes[leaf].stop for leaf, _ in found)
        for found, count in places(policy, tree, draws, wanted).items()
        for _ in range(count)
    )


ALL = tuple(Stop)


def test_candidates_are_those_that_ended_well_or_with_an_answer_or_all_but_failed_ones() -> None:
    tree = leaves(*ALL)

    def who(candidates: str) -> set[Stop | None]:
        return {stop for (stop,) in taken(SegmentBoundary(candidates=candidates), tree)}

    assert who("ended") == {Stop.ANSWER, Stop.STOP_STRING, Stop.EOS}
    assert who("answered") == {Stop.ANSWER}
    assert who("any") == set(Stop) - {Stop.ERROR}


@pytest.mark.parametrize("stop", [Stop.LENGTH, Stop.DEPTH, Stop.REPETITION, Stop.ERROR])
@pytest.mark.parametrize("policy", CUTS, ids=lambda policy: policy.kind)
def test_without_a_candidate_the_tree_restarts_from_its_root(policy: CutBack, stop: Stop) -> None:
    assert set(places(policy, leaves(stop, stop), draws=20, wanted=3)) == {((2, 0),)}


def test_candidates_are_taken_in_random_order_each_once() -> None:
    tree = leaves(Stop.EOS, Stop.ANSWER, Stop.EOS)
    orders = Counter(
        tuple(leaf for leaf, _ in SegmentBoundary()(frontier(tree, [], tree.leaves(), seed=seed), 9))
        for seed in range(3000)
    )
    assert len(orders) == 6 and flat(orders)
    assert all(len(found) == 2 for found in places(SegmentBoundary(), tree, draws=20, wanted=2))


def test_answered_first_draws_answered_paths_with_more_weight() -> None:
    tree = leaves(Stop.EOS, Stop.ANSWER, Stop.EOS)

    def answered(**given: object) -> float:
        return taken(SegmentBoundary(**given), tree, draws=6000)[Stop.ANSWER,] / 6000

    assert answered() == pytest.approx(1 / 3, abs=0.03)
    assert answered(order="answered_first") == pytest.approx(4 / 6, abs=0.03)
    assert answered(order="answered_first", answered_weight=18) == pytest.approx(18 / 20, abs=0.03)


def test_longest_first_takes_the_longest_and_draws_between_equals() -> None:
    tree = leaves(Stop.EOS, Stop.ANSWER, Stop.EOS, Stop.LENGTH, lengths=[2, 5, 5, 9])
    policy = SegmentBoundary(order="longest_first")
    first = {found[0][0] for found in places(policy, tree, draws=50)}
    assert first == {4, 6}, "the nodes of the two of five tokens"
    assert {found[-1][0] for found in places(policy, tree, draws=50, wanted=3)} == {2}


def test_short_responses_are_no_candidates_if_so_set() -> None:
    tree = leaves(Stop.EOS, Stop.EOS, lengths=[2, 5])  # three and six tokens
    assert {found[0][0] for found in places(SegmentBoundary(min_tokens=4), tree, draws=50)} == {4}
    assert {found[0][0] for found in places(SegmentBoundary(min_tokens=3), tree, draws=50)} == {2, 4}
    assert set(places(SegmentBoundary(min_tokens=7), tree, draws=50)) == {((2, 0),)}


# In the sampler -------------------------------------------------------------------------------------------------------


def test_a_dry_tree_opens_at_most_divergence_children_at_each_place_until_the_width_is_reached() -> None:
    def ends_at_once(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [3, 4, EOS] if len(prefix) > 8 else [3] * max_tokens

    one = LevelBudget(divergence=2, first_divergence=1)
    (tree,) = sampler(ScriptedEngine(ends_at_once), width=7, branching=one).sample([("q", [2])], 0)
    assert len(tree.leaves()) == 7


@pytest.mark.parametrize(
    "policy", [GridBoundary(window=3), WeightedBlock(window=3), LowestLogProb()], ids=lambda p: p.kind
)
def test_a_fallback_that_cuts_inside_a_segment_splits_the_node_and_continues_exactly_what_is_kept(
    policy: CutBack,
) -> None:
    def echo(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        middle = [2 + (seed >> i) % 7 for i in range(3)]
        return [2 + (sum(prefix) * 31 + len(prefix)) % 8, *middle, *([EOS] if generator(seed).random() < 0.8 else [])]

    grow = sampler(ScriptedEngine(echo), width=24, segment_tokens=6, fallback=policy)
    halves = 0
    for tree in grow.sample(QUERIES, 0):
        assert len(tree.leaves()) == 24 and Tree.from_json(tree.to_json()) == tree
        assert len({(node.seed, node.start) for node in tree.nodes}) == len(tree), "only halves share a seed"
        for node in tree.nodes[1:]:
            if node.seed != tree.nodes[node.parent].seed:  # the first part of a segment
                prefix = tree.tokens(node.parent)
                assert node.tokens[0] == 2 + (sum(prefix) * 31 + len(prefix)) % 8
            else:
                halves += 1
    assert halves > 20


@pytest.mark.parametrize("policy", [GridBoundary(window=3), LowestLogProb()], ids=lambda policy: policy.kind)
@pytest.mark.parametrize("memory", [False, True], ids=["free", "tight"])
def test_trees_of_a_real_engine_that_are_trimmed_and_cut_inside_segments_are_exact(
    policy: CutBack, memory: bool
) -> None:
    plain = plain_model()
    shape = SamplerSettings(
        width=10,
        segment_tokens=6,
        max_depth=4,
        branching=LevelBudget(first_divergence=2, divergence=1),
        stopping=EarlyStop(answer="ignored", stop_strings=("b", "cd")),
        trim=True,
        fallback=policy,
    )
    prompts = [(str(i), [5, 7, i + 1]) for i in range(4)]
    limit = with_room(len(prompts[0][1]) + shape.tree_tokens, slots=8) if memory else LocalSettings(slots=8)

    def text(tokens: Sequence[int]) -> str:
        return "".join("abcdefghij"[token % 10] for token in tokens)

    trees = Sampler(LocalEngine(prepared(), limit), shape, text, ()).sample(prompts, seed=0)
    halves = sum(node.seed == tree.nodes[node.parent].seed for tree in trees for node in tree.nodes[1:])
    leaves = [tree.nodes[leaf] for tree in trees for leaf in tree.leaves()]
    ended = [text(leaf.tokens) for leaf in leaves if leaf.stop is Stop.STOP_STRING]
    assert halves > 3 and len(ended) > 10
    assert {last[-1] for last in ended} <= {"b", "d"}, "what came after is gone"
    assert max(worst_error(plain, tree) for tree in trees) < 1e-4


def test_rewards_are_not_consulted_a_fallback_sees_no_more_than_the_tree() -> None:
    def answers(letter: str):
        def reply(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
            return encode(f"\\boxed{{{letter}}}") if seed % 2 else [3, EOS]

        return reply

    right = sampler(ScriptedEngine(answers("a")), segment_tokens=9, width=12).sample(QUERIES, 0)
    wrong = sampler(ScriptedEngine(answers("b")), segment_tokens=9, width=12).sample(QUERIES, 0)
    assert [tree.children for tree in right] == [tree.children for tree in wrong]


# A class of the user's own --------------------------------------------------------------------------------------------


class Second:
    """Keep `tokens` of the first finished path; or do as told."""

    def __init__(self, tokens: int = 1, told: object = None) -> None:
        self.tokens, self.told = tokens, told

    def __call__(self, frontier: Frontier, wanted: int) -> list[tuple[int, int]]:
        if self.told is not None:
            return self.told  # type: ignore[return-value]
        return [(frontier.finished[0], min(self.tokens, frontier.longest(frontier.finished[0])))]


OWN = "tests.policies.test_fallback:Second"


def test_a_fallback_of_ones_own_decides() -> None:
    def ends(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [2 + seed % 8, 2 + seed % 7, EOS]

    shape = {"width": 6, "branching": LevelBudget(first_divergence=1)}
    (tree,) = sampler(ScriptedEngine(ends), fallback={"kind": OWN, "tokens": 2}, **shape).sample([("q", [2])], 0)
    (head,) = tree.children[ROOT]
    assert len(tree.nodes[head].tokens) == 2 and len(tree.children[head]) == 6


@pytest.mark.parametrize("told", [[(0, 0)], [(1, 1)], [(1, -1)], [(1, 0)] * 9, 7, [1], [(1, 0, 0)], [(1, 0.5)]])
def test_wrong_places_of_ones_own_fallback_are_refused(told: object) -> None:
    def ends(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [EOS]

    grow = sampler(ScriptedEngine(ends), fallback={"kind": OWN, "told": told}, branching=LevelBudget())
    with pytest.raises(ConfigError, match=f"^{OWN} (chose the place|returned)"):
        grow.sample([("q", [2])], 0)
