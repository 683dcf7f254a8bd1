"""Packing keeps every path, and the packed pass equals one plain row per leaf through Hugging Face's own model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.packed_oracle import (
    EVERYTHING,
    FAMILIES,
    SETTINGS,
    Case,
    errors,
    flat_case,
    paths,
    trained_leaves,
    worst,
)
from tests.support.random_trees import grow_random
from treepo.forest import Forest
from treepo.learner.gradient import logprobs
from treepo.learner.loss import PolicyLoss
from treepo.learner.packing import PackedBatch, bins, fold, pack_row
from treepo.models.attention import PlanName, plan_for, visible
from treepo.tree import ScoredTree, Stop, Tree

seeds = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def forest_of(trees: Sequence[ScoredTree], seed: int = 0) -> tuple[Forest, np.ndarray, PackedBatch]:
    """Their forest, random advantages in eighths (exact in float32, both signs on shared tokens), and one row."""
    forest = Forest.of(trees)
    advantage = np.random.default_rng(seed).integers(-16, 17, forest.path.shape) / 8
    return forest, advantage, pack_row(forest, fold(forest, advantage), range(len(trees)))


def by_prev(batch: PackedBatch, row: int) -> list[int]:
    path = [row]
    while batch.prev[path[-1]] >= 0:
        path.append(int(batch.prev[path[-1]]))
    return path[::-1]


# What a row holds


@seeds
@given(seed=st.integers(0, 10**6), count=st.integers(1, 3), unscored=st.sampled_from([0.0, 0.3]))
def test_a_row_holds_every_trained_path_once_and_nothing_else(
    random_rollout: Callable[..., ScoredTree], seed: int, count: int, unscored: float
) -> None:
    trees = [random_rollout(seed + i, unscored) for i in range(count)]
    forest, advantage, batch = forest_of(trees, seed)

    found = sorted(batch.token_ids[rows].tolist() for rows in paths(batch))
    assert found == sorted(tree.tokens(leaf) for tree, leaf in trained_leaves(trees))
    kept = {(id(tree), n) for tree, leaf in trained_leaves(trees) for n in tree.path(leaf)}
    by_id = {id(scored.tree): scored.tree for scored in trees}
    assert len(batch) == sum(len(by_id[t].nodes[n].tokens) for t, n in kept)
    total = sum(tree.response_length(leaf) for tree, leaf in trained_leaves(trees))
    assert batch.weight.sum() == total
    for sums, sign in ((batch.adv_pos, 1), (batch.adv_neg, -1)):
        per_pair = np.maximum(sign * advantage, 0) * np.where(forest.path >= 0, forest.length[forest.path], 0)
        assert sums.sum() == sign * per_pair[:, 1:].sum()


@seeds
@given(seed=st.integers(0, 10**6))
def test_a_token_sees_its_path_sits_at_its_depth_and_is_predicted_by_the_token_before_it(
    random_rollout: Callable[..., ScoredTree], seed: int
) -> None:
    _, _, batch = forest_of([random_rollout(seed), random_rollout(seed + 1, 0.3)])
    rows = np.arange(len(batch))
    leaves_below = np.zeros(len(batch))
    for path in paths(batch):
        leaves_below[path] += 1
    for t in rows.tolist():
        path = by_prev(batch, t)
        assert path == np.flatnonzero(visible(t, rows, batch.end)).tolist()
        assert batch.position[t] == len(path) - 1
    prompt = batch.weight == 0
    assert (batch.weight[~prompt] == leaves_below[~prompt]).all()
    for column in (batch.rollout_logprob, batch.adv_pos, batch.adv_neg):
        assert (column[prompt] == 0).all()
    assert prompt[batch.prev < 0].all()


@seeds
@given(seed=st.integers(0, 10**6))
def test_the_longest_path_of_a_tree_is_its_first_chain(random_rollout: Callable[..., ScoredTree], seed: int) -> None:
    scored = random_rollout(seed)
    _, _, batch = forest_of([scored])
    longest = max(len(scored.tree.tokens(leaf)) for leaf in scored.tree.leaves())
    assert batch.position[:longest].tolist() == list(range(longest))


def test_the_five_node_tree_drawn_by_hand() -> None:
    #  [1 2] -+- [3 4] -+- [5]       A = +1
    #         |         `- [6 7]     A = -1
    #         `- [8]                 not scored
    tree = Tree([1, 2])
    fork = tree.add(0, [3, 4], [-0.1, -0.2], seed=1)
    tree.add(fork, [5], [-0.3], seed=2, stop=Stop.EOS)
    tree.add(fork, [6, 7], [-0.4, -0.5], seed=3, stop=Stop.EOS)
    tree.add(0, [8], [-0.6], seed=4, stop=Stop.ERROR)
    trees = [ScoredTree("p", tree, [1.0, 0.0, None])]
    forest = Forest.of(trees)
    folded = fold(forest, np.array([[9.0, 1.0, 1.0], [9.0, -1.0, -1.0]]))
    batch = pack_row(forest, folded, [0])
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 6, 7, 5]
    assert batch.position.tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert batch.prev.tolist() == [-1, 0, 1, 2, 3, 4, 3]
    assert batch.end.tolist() == [7, 7, 7, 7, 6, 6, 7]
    assert batch.weight.tolist() == [0, 0, 2, 2, 1, 1, 1]
    assert batch.adv_pos.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert batch.adv_neg.tolist() == [0, 0, -1, -1, -1, -1, 0]
    assert batch.rollout_logprob.tolist() == np.float32([0, 0, -0.1, -0.2, -0.4, -0.5, -0.3]).tolist()


def test_a_tree_without_a_trained_leaf_vanishes(random_rollout: Callable[..., ScoredTree]) -> None:
    trees = [random_rollout(1, 1.0), random_rollout(2), random_rollout(3, 1.0)]
    forest, advantage, batch = forest_of(trees)
    folded = fold(forest, advantage)
    assert len(batch) == len(pack_row(forest, folded, [1]))
    assert bins(forest, folded, [0, 1, 2], 1000) == [[1]]
    assert len(pack_row(forest, folded, [0, 2])) == 0
    empty = pack_row(forest, folded, [0])
    with pytest.raises(ValueError, match="at least one token"):
        plan_for(empty.prev, empty.end)


def test_advantages_of_another_shape_are_refused(random_rollout: Callable[..., ScoredTree]) -> None:
    forest = Forest.of([random_rollout(0)])
    with pytest.raises(ValueError, match="advantages of shape"):
        fold(forest, np.zeros((1, 1)))


@seeds
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 120))
def test_rows_keep_the_budget_unless_one_tree_alone_exceeds_it(
    random_rollout: Callable[..., ScoredTree], seed: int, budget: int
) -> None:
    trees = [random_rollout(seed + i, 0.2) for i in range(7)]
    forest, advantage, _ = forest_of(trees)
    folded = fold(forest, advantage)
    rows = bins(forest, folded, range(7), budget)
    assert rows == bins(forest, folded, range(6, -1, -1), budget)
    sizes = [len(pack_row(forest, folded, row)) for row in rows]
    assert all(size <= budget or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
    assert sorted(t for row in rows for t in row) == sorted(set(forest.tree.tolist()))
    # First fit: no two rows could be one.
    assert all(a + b > budget for i, a in enumerate(sizes) for b in sizes[:i])
    with pytest.raises(ValueError, match="max_tokens"):
        bins(forest, folded, range(7), 0)


def test_packing_loads_no_torch() -> None:
    code = "import sys, treepo.learner.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The oracle: packed against flat


@pytest.mark.parametrize("plan", ["chains", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_flat_in_logits_of_every_row_in_loss_and_in_every_gradient(
    random_tree: Callable[..., Tree], family: str, dtype: torch.dtype, tolerance: float, plan: PlanName
) -> None:
    case = flat_case(family, dtype, random_tree)
    found = errors(case, case.batch, plan)
    assert all(error <= tolerance for error in found.values()), found


@pytest.mark.parametrize(
    "loss", [*(SETTINGS.model_copy(update={"shared_tokens": w}) for w in ("mean", "sqrt")), EVERYTHING], ids=str
)
def test_every_weight_of_shared_tokens_and_every_term_of_the_loss_equals_its_flat_definition(
    loss: PolicyLoss,
) -> None:
    case = flat_case("qwen2", torch.float64, grow_random, loss)
    found = errors(case, case.batch, "auto")
    assert all(error <= 1e-5 for error in found.values()), found  # the folded columns are float32
    other = loss.model_copy(update={"shared_tokens": "sum"})
    assert worst(case.flat_loss, flat_case("qwen2", torch.float64, grow_random, other).flat_loss) > 1e-3


def summed(batch: PackedBatch) -> PackedBatch:
    total = batch.adv_pos + batch.adv_neg
    return replace(batch, adv_pos=np.maximum(total, 0), adv_neg=np.minimum(total, 0))


def rows_of(batch: PackedBatch) -> np.ndarray:
    return np.arange(len(batch))


MUTANTS = {
    "end one too far": (lambda b: replace(b, end=np.minimum(b.end + 1, len(b))), "logits", "reference"),
    "end one too near": (lambda b: replace(b, end=np.maximum(b.end - 1, rows_of(b) + 1)), "logits", "reference"),
    "end one too near, chains": (
        lambda b: replace(b, end=np.maximum(b.end - 1, rows_of(b) + 1)),
        "logits",
        "chains",
    ),
    "siblings visible": (lambda b: replace(b, end=np.full_like(b.end, len(b))), "logits", "reference"),
    "plainly causal": (lambda b: replace(b, prev=rows_of(b) - 1), "logits", "chains"),
    "predicted by the row before": (
        lambda b: replace(b, prev=np.where(b.prev < 0, -1, rows_of(b) - 1)),
        "logprob",
        "reference",
    ),
    "position of the row": (lambda b: replace(b, position=rows_of(b)), "logits", "reference"),
    "position one off in siblings": (
        lambda b: replace(b, position=b.position + (b.prev != rows_of(b) - 1)),
        "logits",
        "chains",
    ),
    "one summed advantage": (summed, "loss", "chains"),
    "rollout log-probs shifted": (
        lambda b: replace(b, rollout_logprob=np.roll(b.rollout_logprob, 1)),
        "gradient",
        "chains",
    ),
    "weights swapped": (lambda b: replace(b, weight=b.weight[::-1].copy()), "loss", "chains"),
}


@pytest.fixture(scope="module")
def exact_case() -> Case:
    return flat_case("qwen2", torch.float64, grow_random, EVERYTHING.model_copy(update={"shared_tokens": "sum"}))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_oracle_rejects(exact_case: Case, mutant: str) -> None:
    break_it, where, plan = MUTANTS[mutant]
    found = errors(exact_case, break_it(exact_case.batch), plan)
    assert not found[where] <= 1e-5, found  # NaN is a rejection too


def test_a_prompt_costs_no_logits_and_has_no_log_prob(exact_case: Case) -> None:
    logprob = logprobs(exact_case.model, exact_case.batch).detach()
    assert logprob.dtype == torch.float64
    assert (logprob == 0).numpy().tolist() == (exact_case.batch.weight == 0).tolist()


def test_the_chunk_does_not_matter_and_temperature_must_be_positive(exact_case: Case) -> None:
    whole, parts = (logprobs(exact_case.model, exact_case.batch, chunk=n).detach() for n in (10**6, 3))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(logprobs(exact_case.model, exact_case.batch), whole, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="temperature"):
        logprobs(exact_case.model, exact_case.batch, temperature=0.0)
