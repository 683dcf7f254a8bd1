"""Where trees fork: the budget of a level, what it is split by, schedules, and classes of the user's own."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scripted_trees import EOS, decode, frontier, mixed_reply, never_ends, per_level, sampler, star
from treepo.engines.scripted import ScriptedEngine, ScriptedHandle
from treepo.errors import ConfigError
from treepo.policies import Frontier
from treepo.policies.branching import LevelBudget, apportion
from treepo.policies.fallback import NoFallback
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import ROOT, Stop, Tree

QUERIES = [(str(i), [2]) for i in range(60)]


def shape(width: int = 16, levels: int = 8, **branching: object) -> list[int]:
    """Segments per level of a tree whose paths never end early."""
    grow = sampler(ScriptedEngine(never_ends), width=width, max_depth=levels, branching=LevelBudget(**branching))
    (tree,) = grow.sample([("q", [2])], 0)
    assert len(tree.leaves()) == width
    return per_level(tree)


def grown(**given: object) -> list[Tree]:
    return sampler(ScriptedEngine(never_ends), **given).sample(QUERIES, 0)


# Budgets --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30), st.integers(1, 8), st.integers(0, 999))
def test_a_levels_budget_is_the_papers(active: int, ended: int, spare: int, divergence: int, seed: int) -> None:
    tree = star(*[[-1.0]] * active)
    state = frontier(
        tree, range(1, active + 1), [0] * ended, finished_now=ended, width=ended + active + spare, seed=seed
    )
    shares = LevelBudget(divergence=divergence)(state)
    assert sum(shares) == max(active, min(active + spare, divergence * ended + divergence * active))
    assert min(shares) >= 1 and max(shares) - min(shares) <= 1


def test_the_remainder_goes_to_random_paths_not_always_to_the_last() -> None:
    tree = star(*[[-1.0]] * 4)
    shares = [LevelBudget()(frontier(tree, [1, 2, 3, 4], width=6, seed=seed)) for seed in range(50)]
    lucky = {i for share in shares for i, children in enumerate(share) if children == 2}
    assert lucky == {0, 1, 2, 3}


def test_the_first_divergence_takes_effect_fixed_or_drawn_and_never_exceeds_the_width() -> None:
    def opened(width: int, first: int | tuple[int, int] | None) -> set[int]:
        trees = grown(width=width, branching=LevelBudget(divergence=3, first_divergence=first))
        return {len(tree.children[ROOT]) for tree in trees}

    assert opened(16, 4) == {4}
    assert opened(16, (2, 8)) == {2, 3, 4, 5, 6, 7, 8}
    assert opened(4, (2, 8)) == {2, 3, 4}
    assert opened(16, None) == {3}, "a path like any other"


def test_the_divergence_is_fixed_or_drawn_per_level() -> None:
    def growth(divergence: int | tuple[int, int]) -> set[tuple[int, ...]]:
        branching = LevelBudget(first_divergence=1, divergence=divergence)
        trees = grown(width=99, max_depth=3, branching=branching, fallback=NoFallback())
        return {tuple(per_level(tree)[1:]) for tree in trees}

    assert growth(3) == {(3, 9)}
    assert growth((2, 3)) == {(2, 4), (2, 6), (3, 6), (3, 9)}


def test_doubling_stops_at_the_width() -> None:
    grow = sampler(ScriptedEngine(never_ends), width=8, branching=LevelBudget(first_divergence=2))
    (tree,) = grow.sample([("q", [2])], 0)
    assert per_level(tree) == [2, 4, 8, 8, 8]
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {Stop.LENGTH}
    assert tree.unique_tokens == 4 * 30 and tree.flat_tokens == 4 * 40


@pytest.mark.parametrize(("transfer", "levels"), [(True, [2, 4, 7]), (False, [2, 2, 4])])
def test_the_budget_of_finished_paths_is_transferred_to_those_alive_or_not(transfer: bool, levels: list[int]) -> None:
    """One of two paths ends: the other opens two children, and two more with the transfer; seven leaves are owed."""
    branching = LevelBudget(first_divergence=2, transfer=transfer)
    (probe,) = sampler(ScriptedEngine(never_ends), width=8, branching=branching).sample([("q", [2])], 0)
    doomed = probe.nodes[probe.children[ROOT][0]].seed

    def first_child_ends(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [EOS] if seed == doomed else never_ends(prefix, max_tokens, seed)

    grow = sampler(ScriptedEngine(first_child_ends), width=8, max_depth=3, branching=branching)
    (tree,) = grow.sample([("q", [2])], 0)
    # Below the leaf that ended there is what a dry tree fell back to, later: only the other half counts.
    other = tree.children[ROOT][1]
    below = [len(tree.children[other]), sum(len(tree.children[child]) for child in tree.children[other])]
    assert [2, *below] == levels


# Where the forks are --------------------------------------------------------------------------------------------------


def test_spread_grows_the_leaves_geometrically_over_the_whole_depth() -> None:
    assert shape(divergence="spread", first_divergence=None) == [round(16 ** (k / 8)) for k in range(1, 9)]
    assert shape(divergence="spread", first_divergence=5) == [5, 5, 5, 5, 6, 8, 11, 16], "never fewer than there are"
    assert shape(divergence=2, first_divergence=None) == [2, 4, 8, 16, 16, 16, 16, 16]


@pytest.mark.parametrize(("transfer", "expected"), [(True, 6), (False, 4)])
def test_spread_owes_the_leaves_of_finished_paths_to_those_alive_only_with_the_transfer(
    transfer: bool, expected: int
) -> None:
    tree = star([-1.0], [-1.0], [-1.0], [-1.0])
    state = frontier(tree, [3, 4], [1, 2], finished_now=2, width=64, levels=4, seed=1)
    shares = LevelBudget(divergence="spread", transfer=transfer)(state)
    assert sum(shares) == expected, "8 paths are due on the second of four levels: 6 more, or half of them"


def test_forks_at_every_kth_level_only() -> None:
    assert shape(first_divergence=4, every=2) == [4, 4, 8, 8, 16, 16, 16, 16]
    assert shape(first_divergence=None, divergence="spread", every=4) == [4, 4, 4, 4, 16, 16, 16, 16]


def test_forks_from_a_level_on_only() -> None:
    assert shape(first_divergence=1, start=4) == [1, 1, 1, 1, 2, 4, 8, 16]
    assert shape(first_divergence=None, start=4) == [1, 1, 1, 1, 2, 4, 8, 16]
    assert shape(first_divergence=1, start=4, divergence="spread") == [1, 1, 1, 1, 2, 4, 8, 16]
    assert shape(first_divergence=2, start=3, every=2) == [2, 2, 2, 4, 4, 8, 8, 16]


def test_a_trunk_that_never_forks_is_filled_up_by_falling_back() -> None:
    trees = sampler(
        ScriptedEngine(mixed_reply), width=6, branching=LevelBudget(first_divergence=1, start=99, divergence="spread")
    ).sample(QUERIES, 0)
    assert all(len(tree.leaves()) == 6 for tree in trees)


def test_a_dry_tree_opens_divergence_children_at_each_place_that_it_falls_back_to() -> None:
    def again(divergence: object, **state: int) -> set[int]:
        policy = LevelBudget(divergence=divergence)
        return {policy.again(frontier(star([-1.0]), [], [1], seed=seed, **state)) for seed in range(30)}

    assert again(3) == {3} and again(9) == {7}, "at most what is owed"
    assert again((1, 3)) == {1, 2, 3}
    assert again("spread", width=1024) == {4}, "what one level adds: the fifth root"


# Allocation -----------------------------------------------------------------------------------------------------------


def split(tree: Tree, width: int, progress: float = 0.0, seed: int = 0, **branching: object) -> list[int]:
    """Children of the tree's frontier when as many may be opened as fit into the width."""
    active = [i for i, children in enumerate(tree.children) if not children]
    state = frontier(tree, active, width=width, progress=progress, seed=seed)
    return LevelBudget(divergence=10**9, **branching)(state)


def test_low_prob_favours_unlikely_paths_high_prob_likely_ones_by_the_papers_softmax() -> None:
    tree = star([-1.0, -1.0], [-3.0, -1.0], [-5.0, -1.0])  # means -1, -2, -3
    weights = [math.exp(x / 2.0) for x in (0.0, 1.0, 2.0)]  # s (x - min x) / T, up to a factor
    exact = [10000 * w / sum(weights) for w in weights]
    low = split(tree, 10003, allocation="low_prob", temperature=2.0)
    assert [share - 1 for share in low] == pytest.approx(exact, abs=1)
    assert split(tree, 10003, allocation="high_prob", temperature=2.0) == low[::-1]
    assert max(even := split(tree, 10003, allocation="uniform")) - min(even) <= 1


def test_shares_are_one_each_and_the_rest_by_largest_remainder() -> None:
    # Weights 2/3 and 1/3: the rest of 5 is split into 3.33 and 1.67, hence 3 and 2.
    tree = star([0.0], [-math.log(2)])
    assert split(tree, 7, allocation="high_prob", temperature=1.0) == [4, 3]
    # Of a rest of 2 the unlikely path's part is .67 and larger than the .33 beyond 1 of the other.
    assert split(tree, 4, allocation="high_prob", temperature=1.0) == [2, 2]


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9), st.integers(0, 50), st.integers(0, 99))
def test_what_is_apportioned_adds_up_and_is_within_one_of_its_quota(raw: list[float], total: int, seed: int) -> None:
    state = frontier(star([-1.0]), seed=seed)
    weights = [w / sum(raw) for w in raw]
    parts = apportion(total, weights, state.rng)
    assert sum(parts) == total
    assert all(abs(part - total * w) < 1 + 1e-9 for part, w in zip(parts, weights, strict=True))


def test_far_apart_paths_give_all_to_one_without_overflow() -> None:
    tree = star([-1.0], [-9000.0])
    assert split(tree, 9, allocation="low_prob", temperature=0.01) == [1, 8]
    assert split(tree, 9, allocation="high_prob", temperature=0.01) == [8, 1]


def test_a_path_is_judged_by_its_last_segment_or_by_the_mean_or_sum_of_all_of_it() -> None:
    tree = star([-1.0, -1.0, -1.0, -1.0], [-6.0])
    tree.add(1, [3], [-3.0], seed=8)  # path of 5 tokens: last segment -3, mean -1.4, sum -7
    tree.add(2, [3, 3], [-2.0, -1.0], seed=9)  # path of 3 tokens: last segment -1.5, mean -3, sum -9
    tree.add(ROOT, [3] * 99, [-0.2] * 99, seed=10)  # -0.2, -0.2, -19.8

    def favoured(over: str) -> int:
        shares = split(tree, 40, allocation="low_prob", over=over, temperature=0.05)
        return shares.index(max(shares))

    # The frontier in the order of its nodes: the long path's root child, then the two others' leaves.
    active = [i for i, children in enumerate(tree.children) if not children]
    assert active == [3, 4, 5]
    assert [favoured(over) for over in ("segment", "path", "path_sum")] == [0, 1, 2]


def test_entropy_favours_paths_that_were_uncertain_and_asks_the_engine_for_it() -> None:
    tree = star([-1.0, -1.0], [-9.0, -9.0], entropies=[[2.0, 2.0], [0.5, 0.5]])
    first, second = split(tree, 10002, allocation="entropy", temperature=1.5)
    assert (first - 1) / (second - 1) == pytest.approx(math.exp(1.0), rel=1e-3)
    known = grown(width=4, branching=LevelBudget(allocation="entropy"))[0]
    assert all(node.entropies is not None for node in known.nodes[1:])
    for plain in (
        grown(width=4, branching=LevelBudget(allocation="low_prob"))[0],
        grown(width=4, branching=LevelBudget(allocation="entropy"), mode="iid")[0],
    ):
        assert all(node.entropies is None for node in plain.nodes), "only what is needed is asked for"


def test_an_engine_without_entropies_is_an_error_that_says_what_else_to_do() -> None:
    class Mute(ScriptedEngine):
        async def open(self, *tree, entropies: bool = False, **more) -> ScriptedHandle:
            return await super().open(*tree, **more)

    settings = SamplerSettings(segment_tokens=4, branching=LevelBudget(allocation="entropy", first_divergence=2))
    with pytest.raises(ConfigError, match=r"allocation: entropy needs .* the engine gives none: .*low_prob"):
        Sampler(Mute(never_ends), settings, decode, ()).sample([("q", [2])], 0)


def test_the_temperature_is_fixed_or_falls_over_the_training_by_half_a_cosine() -> None:
    tree = star([0.0], [-1.0])

    def heat(progress: float, temperature: float | tuple[float, float]) -> float:
        low, high = split(tree, 1000002, progress, allocation="low_prob", temperature=temperature)
        return 1 / math.log((high - 1) / (low - 1))

    quarter = 1 + 4 * (1 + math.sqrt(0.5)) / 2
    for progress, expected in ((0.0, 5.0), (0.25, quarter), (0.5, 3.0), (1.0, 1.0)):
        assert heat(progress, (5.0, 1.0)) == pytest.approx(expected, rel=1e-3)
        assert heat(progress, 2.0) == pytest.approx(2.0, rel=1e-3)


def test_an_allocation_changes_which_paths_of_a_tree_fork() -> None:
    def forked(allocation: str) -> float:
        """Mean log-prob of the segments that got more children than the least favoured of their level."""
        favoured = []
        branching = LevelBudget(allocation=allocation, first_divergence=4, temperature=0.05)
        for tree in grown(width=6, branching=branching):
            level = [tree.nodes[n] for n in tree.children[ROOT] if len(tree.children[n]) > 1]
            favoured += [sum(node.logprobs) / len(node.logprobs) for node in level]
        return sum(favoured) / len(favoured)

    assert forked("low_prob") < forked("uniform") - 0.2 < forked("high_prob") - 0.4


# A class of the user's own --------------------------------------------------------------------------------------------


class Greedy:
    """All children to the first path."""

    needs_entropies = True

    def __init__(self, first: int = 2) -> None:
        self.children = first

    def __call__(self, frontier: Frontier) -> list[int]:
        if list(frontier.active) == [ROOT]:
            return [self.children]
        rest = max(0, frontier.remaining - len(frontier.active))
        return [1 + rest] + [1] * (len(frontier.active) - 1)

    def again(self, frontier: Frontier) -> int:
        return 1


class Wrong(Greedy):
    """Gives back what it is told to."""

    def __init__(self, shares: object = None, places: object = 1) -> None:
        self.shares, self.places = shares, places

    def __call__(self, frontier: Frontier) -> list[int]:
        return self.shares  # type: ignore[return-value]

    def again(self, frontier: Frontier) -> int:
        return self.places  # type: ignore[return-value]


def test_a_branching_of_ones_own_decides_and_gets_its_settings() -> None:
    (tree, *_) = grown(width=6, branching={"kind": "tests.policies.test_branching:Greedy", "first": 3})
    assert per_level(tree) == [3, 6, 6, 6, 6] and len(tree.children[tree.children[ROOT][0]]) == 4
    assert tree.nodes[1].entropies is not None


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], r"gave \[\] children to 1 active paths: it must return a list of 1 whole numbers of at least 1"),
        ([0], "at least 1"),
        ([9], "a sum of at most 8"),
        ([1.5], "whole numbers"),
        (None, "must return a list"),
    ],
)
def test_wrong_shares_of_ones_own_branching_are_refused(shares: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grown(width=8, branching={"kind": "tests.policies.test_branching:Wrong", "shares": shares})


@pytest.mark.parametrize("places", [0, 99, None, 1.5])
def test_a_wrong_number_of_children_to_fall_back_with_is_refused(places: object) -> None:
    policy = sampler(
        ScriptedEngine(never_ends), branching={"kind": "tests.policies.test_branching:Wrong", "places": places}
    ).settings.branching
    with pytest.raises(ConfigError, match=r"`again` must return a whole number from 1 to 7"):
        policy.again(frontier(star([-1.0]), [], [1]))
