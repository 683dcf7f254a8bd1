"""Every plan of a packed row computes the same attention, and the seam refuses what it cannot express."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support.random_trees import grow_random, rollout_of
from treepo.errors import ConfigError
from treepo.forest import Forest
from treepo.learner.packing import PackedBatch, fold, pack_row
from treepo.models.attention import HERE, Causal, Dense, Flex, Plan, Varlen, _attend, plan_for, visible
from treepo.models.attention.blocks import Blocks, refused
from treepo.models.attention.chains import CALL, Chains, Take, cost
from treepo.models.attention.tiling import Tiling, tiling_of
from treepo.tree import ScoredTree, Stop, Tree

CPU = torch.device("cpu")


def row_of(trees: list[ScoredTree]) -> PackedBatch:
    forest = Forest.of(trees)
    return pack_row(forest, fold(forest, np.ones(forest.path.shape)), range(len(trees)))


def random_row(seed: int, count: int = 3, leaves: int = 12, segment: int = 6) -> PackedBatch:
    """A row of `count` random trees; every third seed with failed leaves that add no token."""
    trees = [grow_random(seed + i, leaves=leaves, segment=segment) for i in range(count)]
    if seed % 3 == 0:
        for tree in trees:
            tree.add(tree.node_after(tree.leaves()[0], 0), [], [], seed=0, stop=Stop.ERROR)
    return row_of([rollout_of(tree) for tree in trees])


def row(*segments: tuple[int, int]) -> PackedBatch:
    """One tree of (parent, tokens) segments, the first its prompt; a segment without children is a leaf."""
    tree, parents = Tree([1] * segments[0][1]), {parent for parent, _ in segments}
    for n, (parent, tokens) in enumerate(segments[1:], 1):
        stop = None if n in parents else Stop.EOS if tokens else Stop.ERROR
        tree.add(parent, [2] * tokens, [0.0] * tokens, seed=n, stop=stop)
    return row_of([ScoredTree("p", tree, [1.0] * len(tree.leaves()))])


def qkv(
    batch: PackedBatch,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    heads: tuple[int, int] = (4, 2),
    past: int = 0,
    width: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], len(batch)), *[(heads[1], past + len(batch))] * 2]
    q, k, v = (torch.randn(1, h, n, width, generator=generator, dtype=dtype).requires_grad_() for h, n in shapes)
    return q, k, v


def everything(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v under a weight that differs from place to place."""
    out = plan.attend(0, q, k, v, 0.4)
    assert out.shape == (1, q.shape[2], q.shape[1], q.shape[3])
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).cos().view_as(out)
    return out, *torch.autograd.grad((out * weight).sum(), (q, k, v))


def assert_same(plan: Plan, expected: Plan, q: Tensor, k: Tensor, v: Tensor) -> None:
    for found, right in zip(everything(plan, q, k, v), everything(expected, q, k, v), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def divided_everywhere(batch: PackedBatch) -> Tiling:
    """Each run between two forks is a block, and all that is below it a rectangle: most tiles, none of them masked."""
    forks = set(batch.prev[np.flatnonzero(batch.prev != np.arange(len(batch)) - 1)].tolist())
    edges = [i for i in range(1, len(batch)) if batch.prev[i] != i - 1 or i - 1 in forks] + [len(batch)]
    chains = tuple(zip([0, *edges[:-1]], edges, strict=True))
    rectangles = tuple((b, int(batch.end[b - 1]), a, b) for a, b in chains if batch.end[b - 1] > b)
    return Tiling(0, len(batch), 0.0, chains, (), rectangles)


def flash_by_hand(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, **options: object
) -> Tensor:
    """What variable-length flash attention computes, by sequence: causal, aligned to the last tokens."""
    assert options["window_size"] == (-1, 0)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max(lengths_q), max(lengths_k)) == (longest_q, longest_k)
    outputs = []
    for one_q, one_k, one_v in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) * options["scale"]
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(one_k) - len(one_q))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), one_v))
    return torch.cat(outputs)


PLANS: dict[str, Callable[[PackedBatch, int], Plan]] = {
    "chains": lambda b, past: Chains(b.prev, b.end, past, CPU),
    "blocks": lambda b, past: Blocks(tiling_of(b.prev, b.end), b.end, past),
    "blocks divided everywhere": lambda b, past: Blocks(divided_everywhere(b), b.end, past),
    "varlen": lambda b, past: Varlen(b.prev, past, CPU, flash_by_hand),
}


def test_the_rule_is_the_path() -> None:
    # root 0-1, first child 2-3, second child 4, another tree 5-6
    end = np.array([5, 5, 4, 4, 5, 7, 7])
    rows = np.arange(7)
    sees = [np.flatnonzero(visible(q, rows, end)).tolist() for q in rows]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6]]


def test_the_reference_is_the_rule_with_the_past_seen_by_all() -> None:
    batch = random_row(0, leaves=4)
    mask = Dense(batch.end, 3, CPU).mask
    for i, j in np.ndindex(*mask.shape):
        assert mask[i, j] == (j < 3 or (j - 3 <= i < batch.end[j - 3]))


@pytest.mark.parametrize("name", PLANS)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 4),
    leaves=st.integers(1, 20),
    segment=st.sampled_from([1, 4, 30]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    past=st.sampled_from([0, 1, 9]),
)
@example(seed=1, count=4, leaves=20, segment=30, heads=(4, 2), past=9)
@example(seed=3, count=1, leaves=20, segment=30, heads=(4, 4), past=0)
def test_every_plan_equals_the_reference_in_outputs_and_gradients(
    name: str, seed: int, count: int, leaves: int, segment: int, heads: tuple[int, int], past: int
) -> None:
    batch = random_row(seed, count, leaves, segment)
    assert_same(PLANS[name](batch, past), Dense(batch.end, past, CPU), *qkv(batch, seed, heads=heads, past=past))


SHAPES = {
    "two tokens": row((-1, 1), (0, 1)),
    "one chain": row((-1, 100), (0, 200)),
    "a fork after the first token": row((-1, 1), (0, 40), (0, 60), (0, 1)),
    "tokens one by one": row((-1, 1), (0, 1), (0, 1), (1, 1), (1, 1)),
    "leaves without tokens": row((-1, 50), (0, 0), (0, 30), (2, 60), (2, 60), (2, 0)),
    "a star with a long prompt": row((-1, 600), *[(0, 20)] * 16),
    "a fork every 70 tokens": row((-1, 70), *[p for n in range(0, 20, 2) for p in ((n, 70), (n, 90))]),
    "one tree of many leaves in a row of small ones": row_of(
        [rollout_of(grow_random(s, leaves=n, segment=20)) for s, n in ((1, 2), (2, 60), (3, 2), (4, 2))]
    ),
}


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_equals_the_reference_on(name: str, shape: str, past: int) -> None:
    batch = SHAPES[shape]
    assert_same(PLANS[name](batch, past), Dense(batch.end, past, CPU), *qkv(batch, past=past))


def test_one_chain_is_plainly_causal() -> None:
    batch = SHAPES["one chain"]
    for plan in (Dense(batch.end, 0, CPU), *(make(batch, 0) for make in PLANS.values())):
        assert_same(plan, Causal(), *qkv(batch))


@pytest.mark.parametrize("name", ["chains", "blocks", "blocks divided everywhere"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_a_plan_works_in_single_and_half_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    batch = random_row(1)
    exact = everything(Dense(batch.end, 4, CPU), *qkv(batch, past=4))
    found = everything(PLANS[name](batch, 4), *(x.detach().to(dtype).requires_grad_() for x in qkv(batch, past=4)))
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("name", ["chains", "blocks divided everywhere"])
def test_a_plan_takes_inputs_of_several_precisions_under_autocast(name: str) -> None:
    batch = random_row(1)
    q, k, v = qkv(batch, dtype=torch.float32)
    exact = everything(Dense(batch.end, 0, CPU), q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        out = PLANS[name](batch, 0).attend(0, q, k.bfloat16(), v.bfloat16(), 0.4)
    weight = torch.linspace(-1, 1, out.numel()).cos().view_as(out)
    found = (out, *torch.autograd.grad((out * weight).sum(), (q, k, v)))
    assert out.dtype == torch.bfloat16
    for x, y in zip(found, exact, strict=True):
        assert (x - y).abs().max() <= 3e-2 * y.abs().max()


@pytest.mark.parametrize("name", PLANS)
def test_asking_again_in_the_backward_pass_gives_the_same_gradients(name: str) -> None:
    batch = random_row(2)
    inputs = qkv(batch)
    plan = PLANS[name](batch, 0)
    once = torch.autograd.grad(plan.attend(0, *inputs, 0.4).square().sum(), inputs)
    again = checkpoint(lambda *x: plan.attend(0, *x, 0.4), *inputs, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(again.square().sum(), inputs), once, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_blocks_keep_q_k_v_the_output_and_a_number_per_query_and_head_for_the_backward_pass() -> None:
    batch = random_row(1, leaves=20, segment=30)
    q, k, v = qkv(batch, past=4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        out = PLANS["blocks"](batch, 4).attend(0, q, k, v, 0.4)
    assert sum(x.numel() for x in kept) == q.numel() + k.numel() + v.numel() + out.numel() + out.numel() // 8
    with torch.no_grad():
        assert PLANS["blocks"](batch, 4).attend(0, q, k, v, 0.4).grad_fn is None


@pytest.mark.parametrize("name", PLANS)
def test_the_layout_of_the_inputs_in_memory_does_not_matter(name: str) -> None:
    batch = random_row(1)
    inputs = qkv(batch, past=3)
    odd = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in inputs]
    plan = PLANS[name](batch, 3)
    for x, y in zip(everything(plan, *odd), everything(plan, *inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    batch = random_row(1)
    q, k, v = qkv(batch)
    found = torch.autograd.grad(PLANS["blocks divided everywhere"](batch, 0).attend(0, q, k, v, 0.4).sum(), (q, k, v))
    right = torch.autograd.grad(Dense(batch.end, 0, CPU).attend(0, q, k, v, 0.4).sum(), (q, k, v))
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10**6), leaves=st.integers(1, 20), segment=st.sampled_from([1, 4, 60]))
def test_a_tiling_holds_every_visible_pair_once(seed: int, leaves: int, segment: int) -> None:
    batch = random_row(seed, 2, leaves, segment)
    tiling, rows = tiling_of(batch.prev, batch.end), np.arange(len(batch))
    seen = np.zeros((len(batch), len(batch)), np.int8)
    rule = visible(rows[:, None], rows, batch.end)
    for a, b in tiling.causal:
        seen[a:b, a:b] += np.tri(b - a, dtype=np.int8)
    for a, b in tiling.masked:
        seen[a:b, a:b] += rule[a:b, a:b]
    for a, b, c, d in tiling.rectangles:
        seen[a:b, c:d] += 1
    assert (seen == rule).all()
    assert (tiling.begin, tiling.stop) == (0, len(batch))


def test_a_tiling_costs_no_more_than_one_block_or_one_chain_at_a_time() -> None:
    size = 1000
    chain = tiling_of(np.arange(size) - 1, np.full(size, size))
    assert len(chain.causal) > 1 < len(chain.rectangles) + 1
    assert chain.cost < size * size
    small = row((-1, 10), (0, 5), (0, 5))
    assert tiling_of(small.prev, small.end).masked == ((0, 20),)


def test_the_cost_of_chains_counts_their_keys() -> None:
    batch = random_row(5, segment=1)  # chains of one token among them
    plan = Chains(batch.prev, batch.end, 3, CPU)
    keys = [k for call in plan.calls for k in (call.keys < 3 + len(batch)).sum(1).tolist()]
    queries = [q for call in plan.calls for q in (call.queries < len(batch)).sum(1).tolist()]
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    assert cost(batch.prev, batch.end, 3) == pairs + 77 * len(batch) + 30 * sum(keys)


def test_auto_takes_blocks_for_long_segments_and_chains_for_short_ones() -> None:
    long, short = SHAPES["a star with a long prompt"], random_row(0, count=12, leaves=16, segment=8)
    assert isinstance(plan_for(long.prev, long.end), Blocks)
    assert isinstance(plan_for(short.prev, short.end), Chains)
    assert isinstance(plan_for(short.prev, short.end, past=100_000), Blocks)


def test_equal_chains_share_a_call_and_unlike_ones_do_not() -> None:
    batch = row((-1, 40), *[(0, 20)] * 16)
    assert str(plan_for(batch.prev, batch.end, name="chains")) == "16 chains in 2 calls"
    assert CALL < 200 * 240
    batch = row((-1, 40), (0, 200), (0, 200), (0, 2))
    assert str(plan_for(batch.prev, batch.end, name="chains")) == "3 chains in 3 calls"


def test_a_plan_names_itself() -> None:
    batch = row((-1, 40), (0, 200), (0, 200), (0, 2))
    assert str(Dense(batch.end, 0, CPU)) == "reference"
    assert str(PLANS["blocks divided everywhere"](batch, 7)) == "4 blocks + 2 rectangles"
    assert str(PLANS["varlen"](batch, 0)) == "varlen, 3 chains"
    assert str(Flex(batch.end, 0, CPU)) == "flex, 10 tiles"


@given(seed=st.integers(0, 10**6))
def test_taking_rows_has_the_gradient_of_indexing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, slots = int(rng.integers(1, 8)), int(rng.integers(1, 20))
    index = rng.integers(0, rows + 1, slots)  # rows itself is padding
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.as_tensor(rng.standard_normal((slots, 3))) * torch.as_tensor(index < rows)[:, None]
    expected = torch.autograd.grad((x[torch.as_tensor(np.minimum(index, rows - 1))] * weight).sum(), x)[0]
    found = torch.autograd.grad((Take.plan([index], rows, x.device)(x) * weight).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("past", [0, 7])
def test_flex_equals_the_reference_forward_and_has_no_gradients_on_a_cpu(past: int) -> None:
    batch = random_row(1, leaves=20, segment=30)
    trained = qkv(batch, past=past, dtype=torch.float32)
    inputs = [x.detach() for x in trained]
    plan, reference = Flex(batch.end, past, CPU), Dense(batch.end, past, CPU)
    torch.testing.assert_close(plan.attend(0, *inputs, 0.4), reference.attend(0, *inputs, 0.4), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="no gradients on cpu"):
        plan.attend(0, *trained, 0.4)


def test_this_torch_runs_blocks() -> None:
    assert refused() == ""


def test_an_unknown_plan_is_refused_with_those_of_the_device_and_the_nearest_name() -> None:
    batch = random_row(0)
    with pytest.raises(ConfigError, match=r"auto, blocks, chains, reference \(those of cpu\); did you mean 'chains'"):
        plan_for(batch.prev, batch.end, name="chain")
    for name in set(HERE["cuda"]) - set(HERE["cpu"]):
        with pytest.raises(ConfigError, match=f"'{name}' is not one of .* of cpu"):
            plan_for(batch.prev, batch.end, name=name)


@pytest.mark.parametrize("name", PLANS)
def test_a_packed_pass_has_one_row(name: str) -> None:
    batch = random_row(0)
    two = [x.expand(2, -1, -1, -1) for x in qkv(batch)]
    with pytest.raises(ValueError, match="one row"):
        PLANS[name](batch, 0).attend(0, *two, 0.4)


def test_what_a_plan_cannot_express_is_refused() -> None:
    batch = random_row(0)
    q, k, v = qkv(batch)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="runs under a treepo plan"):
        _attend(module, q, k, v, None)
    for option in ("sliding_window", "softcap", "s_aux"):
        with pytest.raises(ValueError, match=option):
            _attend(module, q, k, v, None, plan=plan_for(batch.prev, batch.end), **{option: 4})
