"""Estimators against the reference values, against trees worked out by hand, and against each other."""

import json
from pathlib import Path

import numpy as np
import pytest

from treepo.advantages import (
    GRPO,
    RLOO,
    SPO,
    AttnRL,
    DrGRPO,
    ReinforcePP,
    TreeGRPO,
    TreePO,
    TreePOSegment,
    TreeRL,
    whitened,
)
from treepo.forest import Forest
from treepo.tree import ROOT, ScoredTree, Stop, Tree

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "advantages_reference.json").read_text())
ARMS = {
    "average": TreePO(),
    "group_size": TreePO(size_weighted=True),
    "average_reject": TreePO(reject_flat_groups=True),
    "group_size_reject": TreePO(size_weighted=True, reject_flat_groups=True),
}
SEGMENT_ARMS = {"segment": TreePOSegment(), "spo": SPO(scale="values")}
# Every estimator with every setting that changes what it computes.
EVERY = [
    *ARMS.values(),
    *(TreePO(use_root=False), TreePO(levels="fork"), TreePOSegment(), TreePOSegment(eta=0.7, whiten=False)),
    *(SPO(), SPO(scale="siblings"), SPO(scale="values"), TreeRL(), AttnRL(), TreeGRPO()),
    *(GRPO(), DrGRPO(), RLOO(), ReinforcePP()),
]


def rollouts_of(batch: dict) -> tuple[list[ScoredTree], list[int]]:
    """The trees of a reference batch, and for each of its rows the position among the forest's leaves."""
    trees: dict[str, tuple[Tree, dict[str, int]]] = {}
    place: list[tuple[str, int]] = []
    for path, length in zip(batch["paths"], batch["lengths"], strict=True):
        query, *names = path.split("#")
        tree, nodes = trees.setdefault(query, (Tree([0], key=query), {"": ROOT}))
        parent = ROOT
        for depth, name in enumerate(names):
            last = depth == len(names) - 1
            if name not in nodes:
                tokens = length - depth * batch["segment"] if last else batch["segment"]
                nodes[name] = tree.add(
                    parent, [1] * tokens, [0.0] * tokens, seed=len(tree), stop=Stop.EOS if last else None
                )
            parent = nodes[name]
        place.append((query, parent))
    reward = dict(zip(place, batch["rewards"], strict=True))
    rollouts = [ScoredTree(q, tree, [reward[q, leaf] for leaf in tree.leaves()]) for q, (tree, _) in trees.items()]
    order = {(r.problem_id, leaf): i for i, (r, leaf) in enumerate((r, x) for r in rollouts for x in r.tree.leaves())}
    return rollouts, [order[p] for p in place]


def leaf_values(estimator, rollouts: list[ScoredTree]) -> np.ndarray:
    forest = Forest.of(rollouts)
    values = estimator(forest)
    on_path = (forest.path >= 0)[:, 1:]
    assert np.all((values[:, 1:] == values[:, 1:2]) | ~on_path), "one value on all tokens of a leaf"
    return values[:, 1]


def token_values(estimator, rollouts: list[ScoredTree]) -> np.ndarray:
    """One number per response token of each leaf, leaf after leaf, however the path is divided into nodes."""
    forest = Forest.of(rollouts)
    on_path = forest.path >= 0
    values = estimator(forest)
    assert not values[~on_path].any(), "entries beyond a path's end are 0"
    return np.repeat(values[on_path], forest.length[forest.path[on_path]])


@pytest.mark.parametrize("arm", ARMS)
def test_treepo_equals_the_reference_values(arm: str) -> None:
    for batch in REFERENCE:
        rollouts, order = rollouts_of(batch)
        np.testing.assert_allclose(leaf_values(ARMS[arm], rollouts)[order], batch["out"][arm], atol=1e-5)


def segment_values(estimator, batch: dict) -> list[list[float]]:
    """For each row of a reference batch the advantages of its segments."""
    rollouts, order = rollouts_of(batch)
    forest = Forest.of(rollouts)
    values = estimator(forest)
    return [values[i, 1 : forest.depth[i] + 1].tolist() for i in order]


@pytest.mark.parametrize("arm", SEGMENT_ARMS)
def test_segment_estimators_equal_the_reference_values(arm: str) -> None:
    for batch in REFERENCE:
        ours = segment_values(SEGMENT_ARMS[arm], batch)
        assert [len(row) for row in ours] == [len(row) for row in batch["out"][arm]]
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(batch["out"][arm]), atol=1e-5)


@pytest.mark.parametrize(
    ("mutant", "arm"),
    [
        (TreePOSegment(whiten=False), "segment"),
        (TreePOSegment(eta=0.9), "segment"),
        (SPO(whiten=True), "segment"),
        (SPO(), "spo"),
        (SPO(scale="siblings"), "spo"),
        (SPO(scale="values", whiten=True), "spo"),
    ],
)
def test_the_reference_rejects_other_segment_estimators(mutant, arm: str) -> None:
    errors = [
        np.abs(np.concatenate(segment_values(mutant, batch)) - np.concatenate(batch["out"][arm])).max()
        for batch in REFERENCE
    ]
    assert max(errors) > 1e-2


@pytest.mark.parametrize(
    ("mutant", "arm"),
    [
        (TreePO(levels="fork"), "average"),
        (TreePO(use_root=False), "average"),
        (TreePO(size_weighted=True), "average"),
        (TreePO(whiten=False), "average"),
        (ReinforcePP(), "average"),
        (TreePO(), "group_size"),
        (TreePO(), "average_reject"),
        (TreePO(size_weighted=True), "group_size_reject"),
        (TreePO(reject_flat_groups=True), "group_size_reject"),
    ],
)
def test_the_reference_rejects_other_estimators(mutant, arm: str) -> None:
    errors = []
    for batch in REFERENCE:
        rollouts, order = rollouts_of(batch)
        errors.append(np.abs(leaf_values(mutant, rollouts)[order] - batch["out"][arm]).max())
    assert max(errors) > 1e-2


def small_tree() -> Tree:
    """Root -> a (leaves c, d) and b (a leaf): five nodes with the root. Leaves in order: b, c, d."""
    tree = Tree([0], key="q")
    a = tree.add(ROOT, [1, 1], [0.0] * 2, seed=1)
    tree.add(ROOT, [1], [0.0], seed=2, stop=Stop.EOS)
    tree.add(a, [1], [0.0], seed=3, stop=Stop.EOS)
    tree.add(a, [1], [0.0], seed=4, stop=Stop.EOS)
    return tree


SMALL = [ScoredTree("q", small_tree(), [0.0, 1.0, 0.0])]
THIRD = 1 / 3


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # G_0 = {b, c, d} with mean 1/3; G_1 of c and d = {c, d} with mean 1/2.
        (TreePO(whiten=False), [-THIRD, (2 * THIRD + 0.5) / 2, (-THIRD - 0.5) / 2]),
        (TreePO(whiten=False, size_weighted=True), [-THIRD, (3 * 2 * THIRD + 2 * 0.5) / 5, (-3 * THIRD - 2 * 0.5) / 5]),
        (TreePO(whiten=False, use_root=False), [0.0, 0.5, -0.5]),
        (GRPO(), np.array([-THIRD, 2 * THIRD, -THIRD]) / (np.std([0, 1, 0], ddof=1) + 1e-6)),
        (DrGRPO(), [-THIRD, 2 * THIRD, -THIRD]),
        (RLOO(), [-0.5, 1.0, -0.5]),
    ],
)
def test_estimators_equal_the_values_worked_out_by_hand(estimator, expected) -> None:
    np.testing.assert_allclose(leaf_values(estimator, SMALL), expected, atol=1e-12)


# Leaves b, c, d with rewards 0, 1, 0; columns a and c of leaf c, a and d of leaf d, b of leaf b.
SEGMENTS = [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2)]  # (leaf, column): b, a, c, a, d
# R' of `segment`: b: (3 (-1/3) + 1 * 0) / 4; c: (3 (2/3) + 2 (1/2)) / 6; d: (3 (-1/3) + 2 (-1/2)) / 6.
B, C, D = -1 / 4, 1 / 2, -1 / 3
A = (C + D) / 2


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (TreePOSegment(whiten=False), [B, A, C - A, A, D - A]),
        (TreePOSegment(whiten=False, eta=0.5), [B, A, C - A / 2, A, D - A / 2]),
        # Values: b 0, c 1, d 0, a 1/2, and the root (0 + 1/2) / 2 = 1/4. Std: 1/4 of a and b, 1/2 of c and d.
        (SPO(), [-1 / 4, 1 / 4, 1 / 2, 1 / 4, -1 / 2]),
        (SPO(scale="siblings"), [-1, 1, 1, 1, -1]),
        (SPO(scale="values"), [-1, 1, 0, 1, -2]),
        # Values: b 0, c 1, d 0, a 1/2, and the root 1/3: global and local gain.
        (AttnRL(), [-2 / 3, 1 / 3, 2 / 3 + 1 / 2, 1 / 3, -1 / 3 - 1 / 2]),
        # RLOO: b -1/2, c 1, d -1/2, a 1/4, and the root 0.
        (TreeRL(), [-1, 1 / 2, 1 + 3 / 4, 1 / 2, -1 / 2 - 3 / 4]),
    ],
)
def test_segment_estimators_equal_the_values_worked_out_by_hand(estimator, expected) -> None:
    values = estimator(Forest.of(SMALL))
    assert [values[place] for place in SEGMENTS] == pytest.approx(expected, abs=1e-6)


def test_tree_grpo_adds_the_z_score_among_the_leaves_of_one_tree() -> None:
    query = np.array([-THIRD, 2 * THIRD, -THIRD]) / np.std([0, 1, 0], ddof=1)
    among = np.array([0.0, 0.5, -0.5]) / np.std([1, 0], ddof=1)
    np.testing.assert_allclose(leaf_values(TreeGRPO(), SMALL), query + among, atol=1e-5)
    stars = [star(4, [1.0, 0.0, 0.0, 1.0]), star(3, [0.0, 0.0, 1.0])]
    np.testing.assert_allclose(leaf_values(TreeGRPO(), stars), leaf_values(GRPO(), stars))


def test_eta_falls_with_the_distance_to_the_leaf_whatever_the_depth_of_the_node() -> None:
    """Root -> a -> (b -> leaf c, leaf d): a, b and c are followed by 2, 1 and 0 segments, but d's a by 1."""
    tree = Tree([0])
    a = tree.add(ROOT, [1], [0.0], seed=1)
    b = tree.add(a, [1], [0.0], seed=2)
    tree.add(b, [1], [0.0], seed=3, stop=Stop.EOS)
    tree.add(a, [1], [0.0], seed=4, stop=Stop.EOS)
    values = TreePOSegment(whiten=False, eta=0.5)(Forest.of([ScoredTree("q", tree, [1.0, 0.0])]))
    # c: (2 (1/2) + 2 (1/2) + 0 + 0) / 6; d: (2 (-1/2) + 2 (-1/2) + 0) / 5; a is their mean, b equals c.
    c, d = 2 / 6, -2 / 5
    at_a = (c + d) / 2
    np.testing.assert_allclose(values, [[0, at_a, c - at_a / 4, c - c / 2], [0, at_a, d - at_a / 2, 0]])


@pytest.mark.parametrize("scale", ["none", "siblings", "values"])
def test_siblings_of_equal_value_gain_nothing(scale: str) -> None:
    third = [star(3, [0.1, 0.1, 0.1])]  # their mean is not exactly 0.1
    assert leaf_values(SPO(scale=scale), third) == pytest.approx([0.0] * 3, abs=1e-8)


def test_a_segment_without_siblings_keeps_its_raw_value_among_z_scores() -> None:
    tree = small_tree()
    leaf_c = ScoredTree("q", tree, [0.0, 0.7, None])  # a has one leaf, c, and the z-score 1
    assert SPO(scale="values")(Forest.of([leaf_c]))[1].tolist() == pytest.approx([0.0, 1.0, 0.7 - 1.0])
    below_a = ScoredTree("q", tree, [None, 0.7, 0.0])  # all leaves share a
    np.testing.assert_allclose(SPO(scale="values")(Forest.of([below_a])), [[0, 0, 1], [0, 0, -1]])


@pytest.mark.parametrize("estimator", EVERY, ids=repr)
def test_a_cut_changes_no_tokens_advantage(estimator, random_rollout) -> None:
    plain, cut = [], []
    for seed in range(30):
        rollout = random_rollout(seed, unscored=0.2, splits=0)
        tree = Tree.from_json(json.loads(json.dumps(rollout.tree.to_json())))
        for node in range(1, len(tree)):
            for _ in range(2):  # into three parts where there are tokens enough
                if len(tree.nodes[node].tokens) > 1:
                    tree.split(node, 1)
        plain.append(rollout)
        cut.append(ScoredTree(rollout.problem_id, tree, rollout.rewards))
    assert sum(len(r.tree) for r in cut) > 2 * sum(len(r.tree) for r in plain)
    np.testing.assert_allclose(token_values(estimator, cut), token_values(estimator, plain), atol=1e-12)


def test_a_leaf_that_hangs_at_a_cut_makes_the_upper_part_a_fork() -> None:
    """a is cut after its first token and e hangs there: b, and above (a of c and d, and e)."""
    tree = small_tree()
    above = tree.split(1, 1)
    tree.add(above, [1, 1], [0.0] * 2, seed=5, stop=Stop.EOS)
    rewards = [0.0, 1.0, 0.0, 1.0]  # b, c, d, e
    values = SPO()(Forest.of([ScoredTree("q", tree, rewards)]))
    # a 1/2, above (1/2 + 1) / 2 = 3/4, root 3/8
    np.testing.assert_allclose(
        values, [[0, -3 / 8, 0, 0], [0, 3 / 8, -1 / 4, 1 / 2], [0, 3 / 8, -1 / 4, -1 / 2], [0, 3 / 8, 1 / 4, 0]]
    )
    unknown = SPO()(Forest.of([ScoredTree("q", tree, [*rewards[:3], None])]))  # e has no say: a is whole again
    np.testing.assert_allclose(unknown[1:], [[0, 1 / 4, 1 / 4, 1 / 2], [0, 1 / 4, 1 / 4, -1 / 2]])


def test_a_trained_path_gains_in_sum_what_its_leaf_is_worth() -> None:
    for batch in REFERENCE[:5]:
        rollouts, _ = rollouts_of(batch)
        forest = Forest.of(rollouts)
        root = SPO()(forest).sum(axis=1) - forest.rewards  # minus the value of the root, the same for all its leaves
        for tree in range(len(rollouts)):
            assert np.ptp(root[forest.tree == tree]) < 1e-12


def test_flat_groups_can_be_rejected_but_the_root_always_stays() -> None:
    same = [ScoredTree("q", small_tree(), [0.0, 1.0, 1.0])]
    np.testing.assert_allclose(leaf_values(TreePO(whiten=False), same), [-2 / 3, THIRD / 2, THIRD / 2])
    rejected = TreePO(whiten=False, reject_flat_groups=True)
    np.testing.assert_allclose(leaf_values(rejected, same), [-2 / 3, THIRD, THIRD])
    flat = [ScoredTree("q", small_tree(), [1.0, 1.0, 1.0])]
    np.testing.assert_allclose(leaf_values(rejected, flat), 0.0)


def test_an_unforked_chain_counts_once_per_segment_or_once_per_fork() -> None:
    chain = Tree([0], key="q")
    a = chain.add(chain.add(ROOT, [1], [0.0], seed=1), [1], [0.0], seed=5)  # two segments in place of small_tree's a
    chain.add(ROOT, [1], [0.0], seed=2, stop=Stop.EOS)
    for seed in (3, 4):
        chain.add(a, [1], [0.0], seed=seed, stop=Stop.EOS)
    chained = [ScoredTree("q", chain, [0.0, 1.0, 0.0])]
    expected = [-THIRD, (2 * THIRD + 0.5 + 0.5) / 3, (-THIRD - 0.5 - 0.5) / 3]
    np.testing.assert_allclose(leaf_values(TreePO(whiten=False), chained), expected)
    once = TreePO(whiten=False, levels="fork")
    np.testing.assert_allclose(leaf_values(once, chained), leaf_values(TreePO(whiten=False), SMALL))


def test_whitening_weighs_every_token_of_every_leaf() -> None:
    # Tokens per leaf: b 1, c 3, d 3.
    raw = np.repeat([-THIRD, 2 * THIRD, -THIRD], [1, 3, 3])
    expected = ((raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8))[[0, 1, 4]]
    np.testing.assert_allclose(leaf_values(ReinforcePP(), SMALL), expected, atol=1e-12)


def star(width: int, rewards: list[float]) -> ScoredTree:
    tree = Tree([0])
    for i in range(width):
        tree.add(ROOT, [1] * (i + 1), [0.0] * (i + 1), seed=i, stop=Stop.EOS)
    return ScoredTree("star", tree, list(rewards))


def test_on_a_star_tree_treepo_is_grpo_without_its_std() -> None:
    stars = [star(4, [1.0, 0.0, 0.0, 1.0]), star(3, [0.0, 0.0, 1.0])]
    np.testing.assert_allclose(leaf_values(TreePO(whiten=False), stars), leaf_values(DrGRPO(), stars))
    np.testing.assert_allclose(leaf_values(TreePO(), stars), leaf_values(ReinforcePP(), stars))
    scaled = leaf_values(DrGRPO(), stars[:1]) / (np.std([1, 0, 0, 1], ddof=1) + 1e-6)
    np.testing.assert_allclose(leaf_values(GRPO(), stars[:1]), scaled)


@pytest.mark.parametrize("estimator", EVERY, ids=repr)
def test_a_lone_leaf_gets_nothing_not_its_raw_reward(estimator) -> None:
    assert leaf_values(estimator, [star(1, [1.0])]).tolist() == [0.0]


@pytest.mark.parametrize("estimator", EVERY, ids=repr)
def test_a_leaf_without_a_known_reward_takes_part_in_no_group(estimator) -> None:
    with_unknown = ScoredTree("q", star(4, [1.0, 0.0, 1.0, 0.0]).tree, [1.0, 0.0, 1.0, None])
    np.testing.assert_allclose(
        leaf_values(estimator, [with_unknown]), leaf_values(estimator, [star(3, [1.0, 0.0, 1.0])])
    )
    # Below the root too: with d unknown, c is all that a has.
    unknown = ScoredTree("q", small_tree(), [0.0, 1.0, None])
    pruned = Tree([0], key="q")
    a = pruned.add(ROOT, [1, 1], [0.0] * 2, seed=1)
    pruned.add(ROOT, [1], [0.0], seed=2, stop=Stop.EOS)
    pruned.add(a, [1], [0.0], seed=3, stop=Stop.EOS)
    np.testing.assert_allclose(
        token_values(estimator, [unknown]), token_values(estimator, [ScoredTree("q", pruned, [0.0, 1.0])])
    )


@pytest.mark.parametrize("estimator", EVERY, ids=repr)
def test_a_batch_without_any_known_reward_is_empty_and_whitens_to_nothing(estimator) -> None:
    for rollouts in ([ScoredTree("q", small_tree(), [None, None, None])], []):
        forest = Forest.of(rollouts)
        assert estimator(forest).shape == forest.path.shape == (0, 1)
        assert whitened(forest, np.zeros((0, 1))).size == 0


def test_estimators_agree_with_a_slow_twin_on_random_trees(random_rollout) -> None:
    rollouts = [random_rollout(seed, unscored=0.2) for seed in range(30)]
    forest = Forest.of(rollouts)
    fast = TreePO(whiten=False)(forest)[:, 1]
    slow = []
    for rollout in rollouts:
        reward = {n: r for n, r in zip(rollout.tree.leaves(), rollout.rewards, strict=True) if r is not None}
        for leaf in reward:
            terms = []
            seen: dict[tuple[int, int], list[float]] = {}  # (segments from the root, leaves) -> rewards
            for node in rollout.tree.path(leaf)[:-1]:
                group = [reward[other] for other in reward if node in rollout.tree.path(other)]
                seen[rollout.tree.nodes[node].depth, len(group)] = group
            for (depth, leaves), group in seen.items():
                if depth == 0 or leaves > 1:
                    terms.append(reward[leaf] - np.mean(group))
            slow.append(np.mean(terms))
    np.testing.assert_allclose(fast, slow, atol=1e-12)
