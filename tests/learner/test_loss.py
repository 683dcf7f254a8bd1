"""The packed loss is the textbook loss summed over leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from treepo.learner.loss import PolicyLoss, policy_loss

NO_DUAL = PolicyLoss(dual_clip=None)


def tensors(*columns: list[float]) -> list[Tensor]:
    return [torch.tensor(column, dtype=torch.float64) for column in columns]


def loss_at(settings: PolicyLoss, ratio: float, advantages: list[float]) -> tuple[float, dict[str, Tensor]]:
    """The loss of one token at `ratio`, shared by one leaf per advantage."""
    logprob, old, pos, neg, weight = tensors(
        [math.log(ratio)],
        [0.0],
        [sum(max(a, 0) for a in advantages)],
        [sum(min(a, 0) for a in advantages)],
        [len(advantages)],
    )
    loss, metrics = policy_loss(settings, logprob, old, pos, neg, weight, 1.0)
    return loss.item(), metrics


def textbook(settings: PolicyLoss, ratio: float, advantage: float) -> float:
    clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
    surrogate = min(ratio * advantage, clipped * advantage)
    if settings.dual_clip is not None and advantage < 0:
        surrogate = max(surrogate, settings.dual_clip * advantage)
    return -surrogate


def test_opposite_advantages_on_a_shared_token_do_not_cancel() -> None:
    loss, metrics = loss_at(PolicyLoss(), 2.0, [1.0, -1.0])
    assert loss == pytest.approx(0.72)  # the objective is min(2, 1.28) - 2; one summed advantage would give 0
    assert metrics["clip/fraction"].item() == pytest.approx(1.0)  # one of its two leaves


@given(
    ratio=st.floats(0.01, 50),
    advantages=st.lists(st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3), min_size=1, max_size=5),
    dual=st.sampled_from([None, 1.5, 10.0]),
)
def test_a_shared_token_costs_the_sum_over_its_leaves(
    ratio: float, advantages: list[float], dual: float | None
) -> None:
    settings = PolicyLoss(dual_clip=dual)
    expected = sum(textbook(settings, ratio, a) for a in advantages)
    assert loss_at(settings, ratio, advantages)[0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_four_corners_of_the_clip_and_the_dual_clip() -> None:
    assert loss_at(NO_DUAL, 2.0, [1.0])[0] == pytest.approx(-1.28)
    assert loss_at(NO_DUAL, 0.5, [1.0])[0] == pytest.approx(-0.5)
    assert loss_at(NO_DUAL, 0.5, [-1.0])[0] == pytest.approx(0.8)
    assert loss_at(NO_DUAL, 20.0, [-1.0])[0] == pytest.approx(20.0)
    assert loss_at(PolicyLoss(), 20.0, [-1.0])[0] == pytest.approx(10.0)


def test_clipped_tokens_have_no_gradient_and_are_counted() -> None:
    logprob, old, pos, neg, weight = tensors(
        [math.log(r) for r in (2.0, 2.0, 0.5, 0.5, 20.0, 1.0)],
        [0.0] * 6,
        [1, 0, 1, 0, 0, 0],
        [0, -1, 0, -1, -1, 0],
        [1, 1, 1, 1, 1, 0],
    )
    logprob.requires_grad_()
    loss, metrics = policy_loss(PolicyLoss(), logprob, old, pos, neg, weight, 5.0)
    loss.backward()
    assert (logprob.grad != 0).tolist() == [False, True, True, False, False, False]
    assert metrics["clip/fraction"].item() == pytest.approx(3 / 5)
    assert not any(value.requires_grad for value in metrics.values())


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_that_of_the_log_prob() -> None:
    logprob, pos, neg, weight = tensors([-1.0, -2.0, 0.0], [2.0, 0.5, 0.0], [-1.0, 0.0, 0.0], [3.0, 1.0, 0.0])
    logprob.requires_grad_()
    loss, metrics = policy_loss(PolicyLoss(), logprob, None, pos, neg, weight, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(2.0 - 1.0 + 0.5) / 4)
    np.testing.assert_allclose(logprob.grad.numpy(), [-0.25, -0.125, 0.0])
    assert metrics["clip/fraction"].item() == metrics["kl/old"].item() == 0.0


def test_rows_add_up_to_the_batch_in_loss_and_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    arrays = [columns[0], columns[1], columns[2].clamp(min=0), columns[3].clamp(max=0), columns[4].abs().ceil()]
    whole, metrics = policy_loss(PolicyLoss(), *arrays, 100.0)
    parts = [policy_loss(PolicyLoss(), *(a[s] for a in arrays), 100.0) for s in (slice(0, 7), slice(7, 40))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name, value in metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


def test_approx_kl_is_near_the_true_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 8, generator=generator, dtype=torch.float64).mul(0.5).log_softmax(-1)
    sampled = torch.multinomial(old.exp(), 40_000, replacement=True, generator=generator)
    zero, one = torch.zeros(40_000, dtype=torch.float64), torch.ones(40_000, dtype=torch.float64)
    _, metrics = policy_loss(PolicyLoss(), new[sampled], old[sampled], zero, zero, one, 40_000.0)
    assert metrics["kl/old"].item() == pytest.approx((old.exp() * (old - new)).sum().item(), rel=0.05)


@pytest.mark.parametrize("bad", [{"dual_clip": 1.0}, {"clip_low": 1.0}, {"clip_high": -0.1}, {"clip": 0.2}])
def test_settings_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PolicyLoss(**bad)
