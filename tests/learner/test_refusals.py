"""What the public learner refuses, and what it says: each mistake would give a wrong gradient without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.packed_oracle import FAMILIES, VOCABULARY, models
from treepo.forest import Forest
from treepo.learner.gradient import LossRow, accumulate, logprobs
from treepo.learner.loss import GSPO, PolicyLoss, policy_loss
from treepo.learner.packing import PackedBatch, Totals, pack
from treepo.learner.update import Learner
from treepo.tree import ROOT, ScoredTree, Stop, Tree


def forest(*, sampled: bool = True, reward: float | None = 1.0) -> Forest:
    tree = Tree([1, 2])
    for seed, tokens in ((1, [3, 4]), (2, [5])):
        logprobs = [-1.0] * len(tokens) if sampled else []
        tree.add(ROOT, tokens, logprobs, seed=seed, stop=Stop.EOS, sampled=sampled)
    return Forest.of([ScoredTree("p", tree, [reward, None if reward is None else 0.0])])


ADVANTAGE = np.array([[0.0, 1.0], [0.0, -1.0]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return models("llama", torch.float32)[0]


@pytest.fixture
def row() -> PackedBatch:
    (row,) = pack(forest(), ADVANTAGE)
    return row


def returning(value: Callable[[Any], Any]) -> Callable[..., Any]:
    """A loss that returns what `value` makes of the tokens' log-probs. It has none of the optional attributes."""
    return lambda tokens, _: value(tokens.logprob)


@pytest.mark.parametrize(
    ("advantage", "options", "reason"),
    [
        (ADVANTAGE[0], {}, r"shape \(2,\) for paths of shape \(2, 2\): there is one row per leaf"),
        (ADVANTAGE * np.nan, {}, "not finite"),
        (ADVANTAGE, {"shared_tokens": "max"}, "shared_tokens is 'max': it must be one of sum, mean, sqrt"),
        (ADVANTAGE, {"trees": [1]}, "tree 1 is not one of the forest's, which are 0 to 0"),
        (ADVANTAGE, {"trees": [-1]}, "tree -1 is not one"),
        (ADVANTAGE, {"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_pack_refuses(advantage: np.ndarray, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack(forest(), advantage, **options)


def test_pack_takes_advantages_of_any_kind_and_ignores_those_of_prompts() -> None:
    (expected,) = pack(forest(), ADVANTAGE)
    for advantage in ([[np.nan, 1], [np.inf, -1]], torch.tensor(ADVANTAGE)):
        (found,) = pack(forest(), advantage)
        assert found.adv_pos.tolist() == expected.adv_pos.tolist() and found.adv_neg.tolist() == [0, 0, 0, 0, -1]


@pytest.mark.parametrize(
    ("change", "loss", "reason"),
    [
        (lambda row: row, PolicyLoss(shared_tokens="mean"), "packed with shared_tokens 'sum', and the loss has 'mean'"),
        (lambda row: row, PolicyLoss(kl=0.1), "needs the log-probs of the initial policy"),
        (lambda row: LossRow(row, torch.zeros(2)), PolicyLoss(), r"old_logprob has the shape \(2,\), .* 5 tokens"),
        (lambda row: LossRow(row, None, torch.zeros(1, 5)), GSPO(), r"reference_logprob has the shape \(1, 5\)"),
        (lambda row: replace(row, token_ids=row.token_ids + 26), GSPO(), f"token id 31, .* below {VOCABULARY}"),
        (lambda row: row, returning(lambda x: x.sum()), r"must return \(a scalar tensor, a dict"),
        (lambda row: row, returning(lambda x: (x, {})), r"must return \(a scalar tensor, a dict"),
        (lambda row: row, returning(lambda x: (x.sum(), {"mine": 1.0})), "metric 'mine' that is not a scalar tensor"),
        (lambda row: row, returning(lambda x: (x.detach().sum(), {})), "does not depend on tokens.logprob"),
    ],
)
def test_accumulate_refuses(
    model: PreTrainedModel, row: PackedBatch, change: Callable[[PackedBatch], Any], loss: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        accumulate(model, [change(row)], loss)


def test_the_optional_attributes_of_a_loss_are_optional(model: PreTrainedModel, row: PackedBatch) -> None:
    found = accumulate(model, [row], returning(lambda x: (x.sum(), {"mine": x.detach().sum()})))
    assert found.metrics["mine"] == found.metrics["loss/total"] < 0


def test_rows_without_a_sampled_token_and_no_rows_at_all_change_nothing(model: PreTrainedModel) -> None:
    (tools,) = pack(forest(sampled=False), ADVANTAGE)
    assert pack(forest(reward=None), np.zeros((0, 1))) == []
    (row,) = pack(forest(), ADVANTAGE)
    gradients = []
    for rows in ([row], [tools, row]):
        model.zero_grad()
        found = accumulate(model, rows, PolicyLoss())
        assert np.isfinite(found.metrics["loss/total"])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    model.zero_grad()
    for rows in ([], [tools]):
        assert (accumulate(model, rows, PolicyLoss()).metrics, model.lm_head.weight.grad) == ({}, None)


def test_a_model_that_would_ignore_the_plan_is_refused(row: PackedBatch) -> None:
    config = FAMILIES["llama"](vocab_size=VOCABULARY, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"call causal_lm\.prepare"):
        logprobs(AutoModelForCausalLM.from_config(config), row)


def test_the_clipped_loss_refuses_to_leave_out_a_term(row: PackedBatch, model: PreTrainedModel) -> None:
    columns = [torch.zeros(3)] * 5
    for loss, missing in ((PolicyLoss(kl=0.1), "reference_logprob"), (PolicyLoss(rollout_cap=2.0), "rollout_logprob")):
        with pytest.raises(ValueError, match=missing):
            policy_loss(loss, *columns, 1.0)
    with pytest.raises(ValueError, match="give a reference"):
        Learner(model, lambda forest: forest.path, PolicyLoss(kl=0.1))
    assert accumulate(model, [LossRow(row, None, torch.zeros(len(row)))], PolicyLoss(kl=0.1)).metrics["kl/reference"]
    assert Totals.of([row]) == Totals(3.0, 2)
