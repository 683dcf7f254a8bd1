"""The public update: `pack` and `accumulate` give the textbook gradient, also for losses over whole responses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.packed_oracle import EVERYTHING, TEMPERATURE, Case, flat_case, flat_gradient, worst
from tests.support.random_trees import grow_random
from treepo.forest import Forest
from treepo.learner.gradient import LossRow, accumulate
from treepo.learner.loss import GSPO, PolicyLoss, TrainedTokens, policy_loss
from treepo.learner.packing import PackedLeaves, Totals, pack
from treepo.tree import ROOT, ScoredTree, Stop, Tree

WIDE = GSPO(clip_low=0.05, clip_high=0.05)  # so that some responses are clipped and some are not


@pytest.fixture(scope="module")
def clipped() -> Case:
    return flat_case("qwen2", torch.float64, grow_random, EVERYTHING)


@pytest.fixture(scope="module")
def plain() -> Case:
    return flat_case("llama", torch.float64, grow_random, PolicyLoss(dual_clip=3.0))


def row_of(case: Case) -> LossRow:
    return LossRow(case.batch, torch.tensor(case.old), torch.tensor(case.reference))


@pytest.mark.parametrize("max_tokens", [12, 10**6])
def test_accumulate_gives_the_textbook_loss_and_gradient(clipped: Case, max_tokens: int) -> None:
    clipped.model.zero_grad()
    found = accumulate(clipped.model, [row_of(clipped)], EVERYTHING, max_tokens=max_tokens, temperature=TEMPERATURE)
    assert found.metrics["loss/total"] == pytest.approx(clipped.flat_loss.item(), rel=1e-6)
    assert found.metrics["entropy/mean"] == pytest.approx(clipped.flat_entropy.item(), rel=1e-6)
    assert worst(flat_gradient(clipped.model), clipped.flat_gradient) <= 1e-7


def test_the_totals_of_the_rows_are_the_default_and_rows_add_up(plain: Case) -> None:
    rows = pack(plain.forest, plain.advantage, max_tokens=1)
    assert len(rows) == len(plain.trees)
    assert Totals.of(rows) == Totals(plain.total, len(plain.rows))
    whole = pack(plain.forest, plain.advantage)
    gradients = []
    for batch in (rows, whole):
        plain.model.zero_grad()
        accumulate(plain.model, batch, PolicyLoss(), temperature=TEMPERATURE)
        gradients.append(flat_gradient(plain.model))
    assert worst(gradients[0], gradients[1]) <= 1e-7
    plain.model.zero_grad()
    for row in rows:
        accumulate(plain.model, [row], PolicyLoss(), totals=Totals.of(rows), temperature=TEMPERATURE)
    assert worst(flat_gradient(plain.model), gradients[1]) <= 1e-7


# GSPO, written out for one plain row per leaf


def flat_gspo(case: Case, settings: GSPO) -> Tensor:
    """Mean over responses and their tokens of -min(s A, clip(s) A), where s has GSPO-token's gradient."""
    values = []
    for leaf, (rows, logprob) in enumerate(zip(case.rows, case.flat_logprob, strict=True)):
        now = logprob
        response = rows[-len(now) :]
        old = torch.tensor(case.old[response]).to(now.dtype)
        sequence = (now - old).mean().exp().detach()
        ratio = sequence * (now - now.detach()).exp()
        a = torch.tensor(leaf_advantages(case, leaf)).to(now.dtype)
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * a)
        values.append(-surrogate.mean())
    return torch.stack(values).mean()


def leaf_advantages(case: Case, leaf: int) -> np.ndarray:
    """[tokens of the response] of a trained leaf."""
    path = case.forest.path[leaf, 1 : case.forest.depth[leaf] + 1]
    return np.repeat(case.advantage[leaf, 1 : case.forest.depth[leaf] + 1], case.forest.length[path])


def gspo_errors(case: Case, row: LossRow, max_tokens: int) -> tuple[float, float]:
    """How far the packed loss and its gradient are from flat."""
    case.plain.zero_grad()
    flat = flat_gspo(flat_again(case), WIDE)
    flat.backward()
    expected = flat_gradient(case.plain)
    case.model.zero_grad()
    found = accumulate(case.model, [row], WIDE, max_tokens=max_tokens, temperature=TEMPERATURE)
    assert 0.1 < found.metrics["clip/fraction"] < 0.9
    return abs(found.metrics["loss/total"] - flat.item()), worst(flat_gradient(case.model), expected)


def flat_again(case: Case) -> Case:
    """The case with flat log-probs whose graph was not used yet."""
    logprobs = []
    for rows, before in zip(case.rows, case.flat_logprob, strict=True):
        ids = torch.tensor(case.batch.token_ids[rows])
        found = (case.plain(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        response = ids[-len(before) :]
        logprobs.append(found[len(ids) - len(before) - 1 : -1].gather(-1, response[:, None])[:, 0])
    return replace(case, flat_logprob=logprobs)


@pytest.mark.parametrize("max_tokens", [1, 30, 10**6])
def test_a_loss_over_responses_equals_flat_whole_and_in_pieces(plain: Case, max_tokens: int) -> None:
    loss, gradient = gspo_errors(plain, LossRow(plain.batch, torch.tensor(plain.old)), max_tokens)
    assert loss <= 1e-7
    assert gradient <= 1e-6  # folded columns are float32


def test_the_oracle_rejects_leaves_with_each_others_paths(plain: Case) -> None:
    leaves = plain.batch.leaves
    wrong = replace(plain.batch, leaves=PackedLeaves(np.roll(leaves.path, 1, axis=0), leaves.advantage))
    assert gspo_errors(plain, LossRow(wrong, torch.tensor(plain.old)), 10**6)[1] > 1e-3


def test_on_policy_gspo_has_the_gradient_of_the_mean_log_prob(plain: Case) -> None:
    tokens = TrainedTokens.of(plain.batch, np.flatnonzero(plain.batch.weight > 0), torch.zeros(1), responses=True)
    logprob = torch.randn(len(tokens.weight), dtype=torch.float64).requires_grad_()
    loss, metrics = GSPO()(replace(tokens, logprob=logprob), Totals.of([plain.batch]))
    loss.backward()
    expected = torch.zeros(len(plain.batch), dtype=torch.float64)
    for leaf, rows in enumerate(plain.rows):
        a = leaf_advantages(plain, leaf)
        expected[rows[-len(a) :]] -= torch.tensor(a) / len(a) / len(plain.rows)
    torch.testing.assert_close(logprob.grad, expected[plain.batch.weight > 0])
    assert metrics["clip/fraction"] == metrics["kl/old"] == 0


# What the policy did not sample


def with_tool_output(sampled: bool) -> ScoredTree:
    tree = Tree([1, 2, 3])
    call = tree.add(ROOT, [4, 5], [-1.0, -2.0], seed=1)
    result = tree.add(call, [6, 7], [-1.0, -1.0] if sampled else [], seed=2, sampled=sampled)
    for seed in (3, 4):
        tree.add(result, [seed, 9], [-0.5, -0.5], seed=seed, stop=Stop.EOS)
    return ScoredTree("p", tree, [1.0, 0.0])


def test_tokens_that_were_not_sampled_are_seen_but_not_trained_on() -> None:
    forest = Forest.of([with_tool_output(sampled=False)])
    (row,) = pack(forest, np.where(forest.path >= 0, 1.0, 0.0))
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 3, 9, 4, 9]
    assert row.weight.tolist() == [0, 0, 0, 2, 2, 0, 0, 1, 1, 1, 1]
    assert row.adv_pos.tolist() == row.weight.tolist()
    assert Totals.of([row]).weight == 8
    (other,) = pack(Forest.of([with_tool_output(sampled=True)]), np.where(forest.path >= 0, 1.0, 0.0))
    assert (other.end == row.end).all() and (other.prev == row.prev).all()  # who sees whom is the same
    assert Totals.of([other]).weight == 12


def test_the_mismatch_of_the_engine_is_its_divergence_from_the_trainer() -> None:
    generator = torch.Generator().manual_seed(0)
    rollout, old = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    n = 40_000
    sampled = torch.multinomial(rollout.exp(), n, replacement=True, generator=generator)
    zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    now = old[sampled] + 1.0  # the policy has moved; the mismatch is that of the old one
    _, metrics = policy_loss(
        PolicyLoss(), now, old[sampled], zero, zero, one, float(n), rollout_logprob=rollout[sampled]
    )
    # In the other direction it is .511, and its estimate from these samples is .476.
    assert metrics["kl/rollout"].item() == pytest.approx(0.368, rel=0.03)
