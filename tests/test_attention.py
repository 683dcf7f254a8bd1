"""Every plan of a packed row computes the same attention, and the seam refuses what it cannot express."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treepo.attention import CALL, Causal, Chains, Dense, _attend, _Take, plan_for, visible
from treepo.errors import ConfigError
from treepo.forest import Forest
from treepo.packing import PackedBatch, fold, pack
from treepo.tree import Rollout, Stop, Tree


def row_of(rollouts: list[Rollout]) -> PackedBatch:
    forest = Forest.of(rollouts)
    return pack(rollouts, forest, fold(forest, np.ones(forest.path.shape)), range(len(rollouts)))


def qkv(batch: PackedBatch, seed: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, width: int = 8) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, kv_heads, kv_heads)
    return tuple(
        torch.randn(1, h, len(batch), width, generator=generator, dtype=dtype).requires_grad_() for h in shapes
    )


def test_the_rule_is_the_path() -> None:
    # root 0-1, first child 2-3, second child 4, another tree 5-6
    end = np.array([5, 5, 4, 4, 5, 7, 7])
    rows = np.arange(7)
    sees = [np.flatnonzero(visible(q, rows, end)).tolist() for q in rows]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6]]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 4),
    leaves=st.integers(1, 20),
    segment=st.sampled_from([1, 4, 30]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
)
def test_chains_equal_the_reference_in_outputs_and_gradients(
    random_rollout: Callable[..., Rollout], seed: int, count: int, leaves: int, segment: int, heads: tuple[int, int]
) -> None:
    batch = row_of([random_rollout(seed + i, leaves=leaves, segment=segment) for i in range(count)])
    q, k, v = qkv(batch, seed, torch.float64, *heads)
    results = []
    for name in ("dense", "chains"):
        out = plan_for(batch, name).attend(0, q, k, v, 0.4)
        assert out.shape == (1, len(batch), heads[0], 8)
        # A gradient that differs from place to place, so that no two tokens can change places unseen.
        results.append(
            (out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), (q, k, v)))
        )
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_chains_work_in_single_and_half_precision(
    random_rollout: Callable[..., Rollout], dtype: torch.dtype, tolerance: float
) -> None:
    batch = row_of([random_rollout(seed, leaves=12) for seed in range(3)])
    exact = plan_for(batch, "dense").attend(0, *qkv(batch, 0, torch.float64), 0.4)
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(batch, 0, torch.float64)]
    out = plan_for(batch, "chains").attend(0, *inputs, 0.4)
    out.sum().backward()
    assert out.dtype == inputs[1].grad.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


def test_one_chain_is_plainly_causal() -> None:
    tree = Tree([1, 2, 3])
    tree.add(0, [4, 5], [0.0, 0.0], seed=1, stop=Stop.EOS)
    batch = row_of([Rollout("p", tree, [1.0])])
    inputs = qkv(batch, 0, torch.float64)
    for name in ("chains", "dense"):
        torch.testing.assert_close(
            plan_for(batch, name).attend(0, *inputs, 0.4), Causal().attend(0, *inputs, 0.4), rtol=0, atol=1e-12
        )


def test_equal_chains_share_a_call_and_unlike_ones_do_not() -> None:
    tree = Tree([1] * 40)
    for seed in range(16):
        tree.add(0, [2] * 20, [0.0] * 20, seed=seed, stop=Stop.EOS)
    batch = row_of([Rollout("p", tree, [1.0] * 16)])
    assert str(plan_for(batch)) == "16 chains in 2 calls"
    assert str(plan_for(batch, "dense")) == "dense"
    other = Tree([1] * 40)
    for seed, length in enumerate((200, 200, 2)):
        other.add(0, [2] * length, [0.0] * length, seed=seed, stop=Stop.EOS)
    assert CALL < 200 * 240
    assert str(plan_for(row_of([Rollout("p", other, [1.0] * 3)]))) == "3 chains in 3 calls"


@given(seed=st.integers(0, 10**6))
def test_taking_rows_has_the_gradient_of_indexing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, slots = int(rng.integers(1, 8)), int(rng.integers(1, 20))
    index = rng.integers(0, rows + 1, slots)  # rows itself is padding
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.as_tensor(rng.standard_normal((slots, 3))) * torch.as_tensor(index < rows)[:, None]
    expected = torch.autograd.grad((x[torch.as_tensor(np.minimum(index, rows - 1))] * weight).sum(), x)[0]
    found = torch.autograd.grad((_Take.plan([index], rows, x.device)(x) * weight).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_an_unknown_plan_is_refused_with_the_nearest_name(random_rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'chains'"):
        plan_for(row_of([random_rollout(0)]), "chain")


def test_a_packed_pass_has_one_row(random_rollout: Callable[..., Rollout]) -> None:
    batch = row_of([random_rollout(0)])
    two = [x.expand(2, -1, -1, -1) for x in qkv(batch, 0, torch.float32)]
    with pytest.raises(ValueError, match="one row"):
        plan_for(batch, "chains").attend(0, *two, 0.4)


def test_what_a_plan_cannot_express_is_refused(random_rollout: Callable[..., Rollout]) -> None:
    batch = row_of([random_rollout(0)])
    q, k, v = qkv(batch, 0, torch.float32)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="runs under a treepo plan"):
        _attend(module, q, k, v, None)
    for option in ("sliding_window", "softcap", "s_aux"):
        with pytest.raises(ValueError, match=option):
            _attend(module, q, k, v, None, plan=plan_for(batch), **{option: 4})


def test_both_plans_are_plans(random_rollout: Callable[..., Rollout]) -> None:
    batch = row_of([random_rollout(0)])
    assert isinstance(plan_for(batch), Chains)
    assert isinstance(plan_for(batch, "dense"), Dense)
