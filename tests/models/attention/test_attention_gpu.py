"""The plans for CUDA against the rule, forward and backward. Skipped where there is no CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.random_trees import grow_random, rollout_of
from treepo.errors import ConfigError
from treepo.forest import Forest
from treepo.learner.packing import PackedBatch, fold, pack_row
from treepo.models.attention import Dense, Flex, plan_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HEADS, KV_HEADS, WIDTH = 4, 2, 64


def row_of(seeds: range) -> PackedBatch:
    trees = [rollout_of(grow_random(seed, leaves=20, segment=30)) for seed in seeds]
    forest = Forest.of(trees)
    return pack_row(forest, fold(forest, np.ones(forest.path.shape)), range(len(trees)))


def qkv(batch: PackedBatch, past: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, len(batch)), *[(KV_HEADS, past + len(batch))] * 2]
    made = [torch.randn(1, h, n, WIDTH, generator=generator) for h, n in shapes]
    return [x.to("cuda", dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("past", [0, 7, 200])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("chains", torch.float32, 1e-4),
        ("flex", torch.float32, 1e-4),
        ("flex", torch.bfloat16, 3e-2),
        ("varlen", torch.bfloat16, 3e-2),
    ],
)
def test_a_plan_on_cuda_equals_the_reference_in_outputs_and_gradients(
    name: str, dtype: torch.dtype, tolerance: float, past: int
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for seeds in (range(3), range(3, 5)):  # rows of two lengths: the second one runs what was compiled for the first
        batch = row_of(seeds)
        inputs = qkv(batch, past, dtype)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        results = []
        for plan, given in (
            (Dense(batch.end, past, torch.device("cuda")), exact),
            (plan_for(batch.prev, batch.end, past, name, "cuda"), inputs),
        ):
            out = plan.attend(0, *given, 0.2)
            weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device="cuda").cos().view_as(out)
            results.append((out, *torch.autograd.grad((out * weight).sum(), given)))
        for expected, found in zip(*results, strict=True):
            assert found.dtype == dtype
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_auto_is_flex_on_cuda_and_what_is_made_for_cpus_is_refused() -> None:
    batch = row_of(range(2))
    assert isinstance(plan_for(batch.prev, batch.end, device="cuda"), Flex)
    with pytest.raises(ConfigError, match="'blocks' is not one of"):
        plan_for(batch.prev, batch.end, name="blocks", device="cuda")
