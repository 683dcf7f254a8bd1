"""Estimators against the reference values, against trees worked out by hand, and against each other."""

import json
from pathlib import Path

import numpy as np
import pytest

from treepo.advantages import GRPO, RLOO, DrGRPO, ReinforcePP, TreePO, advantages, whiten
from treepo.forest import Forest
from treepo.tree import ROOT, Rollout, Stop, Tree

REFERENCE = json.loads((Path(__file__).parent / "data" / "advantages_reference.json").read_text())
ARMS = {
    "average": TreePO(),
    "group_size": TreePO(size_weighted=True),
    "average_reject": TreePO(reject_flat_groups=True),
    "group_size_reject": TreePO(size_weighted=True, reject_flat_groups=True),
}


def rollouts_of(batch: dict) -> tuple[list[Rollout], list[int]]:
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
    rollouts = [Rollout(q, tree, [reward[q, leaf] for leaf in tree.leaves()]) for q, (tree, _) in trees.items()]
    order = {(r.problem_id, leaf): i for i, (r, leaf) in enumerate((r, x) for r in rollouts for x in r.tree.leaves())}
    return rollouts, [order[p] for p in place]


def leaf_values(estimator, rollouts: list[Rollout]) -> np.ndarray:
    forest = Forest.of(rollouts)
    values = advantages(estimator, forest)
    on_path = (forest.path >= 0)[:, 1:]
    assert np.all((values[:, 1:] == values[:, 1:2]) | ~on_path), "one value on all tokens of a leaf"
    return values[:, 1]


@pytest.mark.parametrize("arm", ARMS)
def test_treepo_equals_the_reference_values(arm: str) -> None:
    for batch in REFERENCE:
        rollouts, order = rollouts_of(batch)
        np.testing.assert_allclose(leaf_values(ARMS[arm], rollouts)[order], batch["out"][arm], atol=1e-5)


@pytest.mark.parametrize(
    ("mutant", "arm"),
    [
        (TreePO(levels="fork"), "average"),
        (TreePO(use_root=False), "average"),
        (TreePO(size_weighted=True), "average"),
        (TreePO(whiten=False), "average"),
        (ReinforcePP(), "average"),
        (TreePO(), "group_size"),
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


SMALL = [Rollout("q", small_tree(), [0.0, 1.0, 0.0])]
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


def test_flat_groups_can_be_rejected_but_the_root_always_stays() -> None:
    same = [Rollout("q", small_tree(), [0.0, 1.0, 1.0])]
    np.testing.assert_allclose(leaf_values(TreePO(whiten=False), same), [-2 / 3, THIRD / 2, THIRD / 2])
    rejected = TreePO(whiten=False, reject_flat_groups=True)
    np.testing.assert_allclose(leaf_values(rejected, same), [-2 / 3, THIRD, THIRD])
    flat = [Rollout("q", small_tree(), [1.0, 1.0, 1.0])]
    np.testing.assert_allclose(leaf_values(rejected, flat), 0.0)


def test_an_unforked_chain_counts_once_per_node_or_once_per_fork() -> None:
    chain = small_tree()
    chain.split(1, 1)  # the segment a becomes a chain of two nodes
    chained = [Rollout("q", chain, [0.0, 1.0, 0.0])]
    expected = [-THIRD, (2 * THIRD + 0.5 + 0.5) / 3, (-THIRD - 0.5 - 0.5) / 3]
    np.testing.assert_allclose(leaf_values(TreePO(whiten=False), chained), expected)
    once = TreePO(whiten=False, levels="fork")
    np.testing.assert_allclose(leaf_values(once, chained), leaf_values(TreePO(whiten=False), SMALL))


def test_whitening_weighs_every_token_of_every_leaf() -> None:
    # Tokens per leaf: b 1, c 3, d 3.
    raw = np.repeat([-THIRD, 2 * THIRD, -THIRD], [1, 3, 3])
    expected = ((raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8))[[0, 1, 4]]
    np.testing.assert_allclose(leaf_values(ReinforcePP(), SMALL), expected, atol=1e-12)


def star(width: int, rewards: list[float]) -> Rollout:
    tree = Tree([0])
    for i in range(width):
        tree.add(ROOT, [1] * (i + 1), [0.0] * (i + 1), seed=i, stop=Stop.EOS)
    return Rollout("star", tree, list(rewards))


def test_on_a_star_tree_treepo_is_grpo_without_its_std() -> None:
    stars = [star(4, [1.0, 0.0, 0.0, 1.0]), star(3, [0.0, 0.0, 1.0])]
    np.testing.assert_allclose(leaf_values(TreePO(whiten=False), stars), leaf_values(DrGRPO(), stars))
    np.testing.assert_allclose(leaf_values(TreePO(), stars), leaf_values(ReinforcePP(), stars))
    scaled = leaf_values(DrGRPO(), stars[:1]) / (np.std([1, 0, 0, 1], ddof=1) + 1e-6)
    np.testing.assert_allclose(leaf_values(GRPO(), stars[:1]), scaled)


@pytest.mark.parametrize("estimator", [TreePO(), GRPO(), DrGRPO(), RLOO(), ReinforcePP(), TreePO(use_root=False)])
def test_a_lone_leaf_gets_nothing_not_its_raw_reward(estimator) -> None:
    assert leaf_values(estimator, [star(1, [1.0])]).tolist() == [0.0]


@pytest.mark.parametrize("estimator", [TreePO(), GRPO(), RLOO()])
def test_a_leaf_without_a_known_reward_takes_part_in_no_group(estimator) -> None:
    with_unknown = Rollout("q", star(4, [1.0, 0.0, 1.0, 0.0]).tree, [1.0, 0.0, 1.0, None])
    np.testing.assert_allclose(
        leaf_values(estimator, [with_unknown]), leaf_values(estimator, [star(3, [1.0, 0.0, 1.0])])
    )


def test_a_batch_without_any_known_reward_is_empty_and_whitens_to_nothing() -> None:
    forest = Forest.of([Rollout("q", small_tree(), [None, None, None])])
    assert advantages(TreePO(), forest).shape[0] == 0
    assert whiten(forest, np.zeros((0, forest.path.shape[1]))).size == 0


def test_estimators_agree_with_a_slow_twin_on_random_trees(random_rollout) -> None:
    rollouts = [random_rollout(seed, unscored=0.2) for seed in range(30)]
    forest = Forest.of(rollouts)
    fast = TreePO(whiten=False)(forest)[:, 1]
    slow = []
    for rollout in rollouts:
        reward = {n: r for n, r in zip(rollout.tree.leaves(), rollout.rewards, strict=True) if r is not None}
        for leaf in reward:
            terms = []
            for depth, node in enumerate(rollout.tree.path(leaf)[:-1]):
                group = [reward[other] for other in reward if node in rollout.tree.path(other)]
                if depth == 0 or len(group) > 1:
                    terms.append(reward[leaf] - np.mean(group))
            slow.append(np.mean(terms))
    np.testing.assert_allclose(fast, slow, atol=1e-12)
