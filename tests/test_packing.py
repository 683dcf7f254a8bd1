"""Packing keeps every path, and the packed pass equals one plain row per leaf through Hugging Face's own model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import grow_random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from treepo.attention import PlanName, plan_for, visible
from treepo.forest import Forest
from treepo.loss import LossSettings, policy_loss
from treepo.model import hidden, logits, logprobs, prepare
from treepo.packing import PackedBatch, bins, fold, pack
from treepo.tree import Rollout, Stop, Tree

VOCABULARY = 30
TEMPERATURE = 0.7
FAMILIES = {"qwen2": Qwen2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}
seeds = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def forest_of(rollouts: Sequence[Rollout], seed: int = 0) -> tuple[Forest, np.ndarray, PackedBatch]:
    """Their forest, random advantages in eighths (exact in float32, both signs on shared tokens), and one row."""
    forest = Forest.of(rollouts)
    advantage = np.random.default_rng(seed).integers(-16, 17, forest.path.shape) / 8
    return forest, advantage, pack(rollouts, forest, fold(forest, advantage), range(len(rollouts)))


def trained_leaves(rollouts: Sequence[Rollout]) -> list[tuple[Tree, int]]:
    return [
        (r.tree, leaf)
        for r in rollouts
        for leaf, reward in zip(r.tree.leaves(), r.rewards, strict=True)
        if reward is not None
    ]


def paths(batch: PackedBatch) -> list[list[int]]:
    """The rows of each leaf's path, read from `end` alone: a row with nothing below it is the end of a leaf."""
    rows = np.arange(len(batch))
    return [np.flatnonzero(visible(t, rows, batch.end)).tolist() for t in rows[batch.end == rows + 1]]


def by_prev(batch: PackedBatch, row: int) -> list[int]:
    path = [row]
    while batch.prev[path[-1]] >= 0:
        path.append(int(batch.prev[path[-1]]))
    return path[::-1]


# What a row holds


@seeds
@given(seed=st.integers(0, 10**6), count=st.integers(1, 3), unscored=st.sampled_from([0.0, 0.3]))
def test_a_row_holds_every_trained_path_once_and_nothing_else(
    random_rollout: Callable[..., Rollout], seed: int, count: int, unscored: float
) -> None:
    rollouts = [random_rollout(seed + i, unscored) for i in range(count)]
    forest, advantage, batch = forest_of(rollouts, seed)

    found = sorted(batch.token_ids[rows].tolist() for rows in paths(batch))
    assert found == sorted(tree.tokens(leaf) for tree, leaf in trained_leaves(rollouts))
    kept = {(id(tree), n) for tree, leaf in trained_leaves(rollouts) for n in tree.path(leaf)}
    trees = {id(r.tree): r.tree for r in rollouts}
    assert len(batch) == sum(len(trees[t].nodes[n].tokens) for t, n in kept)
    total = sum(tree.response_length(leaf) for tree, leaf in trained_leaves(rollouts))
    assert batch.weight.sum() == total
    for sums, sign in ((batch.adv_pos, 1), (batch.adv_neg, -1)):
        per_pair = np.maximum(sign * advantage, 0) * np.where(forest.path >= 0, forest.length[forest.path], 0)
        assert sums.sum() == sign * per_pair[:, 1:].sum()


@seeds
@given(seed=st.integers(0, 10**6))
def test_a_token_sees_its_path_sits_at_its_depth_and_is_predicted_by_the_token_before_it(
    random_rollout: Callable[..., Rollout], seed: int
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
def test_the_longest_path_of_a_tree_is_its_first_chain(random_rollout: Callable[..., Rollout], seed: int) -> None:
    rollout = random_rollout(seed)
    _, _, batch = forest_of([rollout])
    longest = max(len(rollout.tree.tokens(leaf)) for leaf in rollout.tree.leaves())
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
    rollouts = [Rollout("p", tree, [1.0, 0.0, None])]
    forest = Forest.of(rollouts)
    folded = fold(forest, np.array([[9.0, 1.0, 1.0], [9.0, -1.0, -1.0]]))
    batch = pack(rollouts, forest, folded, [0])
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 6, 7, 5]
    assert batch.position.tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert batch.prev.tolist() == [-1, 0, 1, 2, 3, 4, 3]
    assert batch.end.tolist() == [7, 7, 7, 7, 6, 6, 7]
    assert batch.weight.tolist() == [0, 0, 2, 2, 1, 1, 1]
    assert batch.adv_pos.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert batch.adv_neg.tolist() == [0, 0, -1, -1, -1, -1, 0]
    assert batch.rollout_logprob.tolist() == np.float32([0, 0, -0.1, -0.2, -0.4, -0.5, -0.3]).tolist()


def test_a_tree_without_a_trained_leaf_vanishes(random_rollout: Callable[..., Rollout]) -> None:
    rollouts = [random_rollout(1, 1.0), random_rollout(2), random_rollout(3, 1.0)]
    forest, advantage, batch = forest_of(rollouts)
    folded = fold(forest, advantage)
    assert len(batch) == len(pack(rollouts, forest, folded, [1]))
    assert bins(rollouts, forest, folded, [0, 1, 2], 1000) == [[1]]
    assert len(pack(rollouts, forest, folded, [0, 2])) == 0
    with pytest.raises(ValueError, match="at least one token"):
        plan_for(pack(rollouts, forest, folded, [0]))


def test_advantages_of_another_shape_are_refused(random_rollout: Callable[..., Rollout]) -> None:
    forest = Forest.of([random_rollout(0)])
    with pytest.raises(ValueError, match="advantages of shape"):
        fold(forest, np.zeros((1, 1)))


@seeds
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 120))
def test_rows_keep_the_budget_unless_one_tree_alone_exceeds_it(
    random_rollout: Callable[..., Rollout], seed: int, budget: int
) -> None:
    rollouts = [random_rollout(seed + i, 0.2) for i in range(7)]
    forest, advantage, _ = forest_of(rollouts)
    folded = fold(forest, advantage)
    rows = bins(rollouts, forest, folded, range(7), budget)
    assert rows == bins(rollouts, forest, folded, range(6, -1, -1), budget)
    sizes = [len(pack(rollouts, forest, folded, row)) for row in rows]
    assert all(size <= budget or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
    assert sorted(t for row in rows for t in row) == sorted(set(forest.tree.tolist()))
    # First fit: no two rows could be one.
    assert all(a + b > budget for i, a in enumerate(sizes) for b in sizes[:i])
    with pytest.raises(ValueError, match="max_tokens"):
        bins(rollouts, forest, folded, range(7), 0)


def test_packing_loads_no_torch() -> None:
    code = "import sys, treepo.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The oracle: packed against flat


def exact_rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Hugging Face's is in float32 whatever the model."""
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


def models(family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Equal weights twice: under treepo's attention, and untouched (in float64 with an RMSNorm that keeps it)."""
    torch.manual_seed(0)
    shape = {"head_dim": 8} if family != "qwen2" else {}
    config = FAMILIES[family](
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.15,
        max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **shape,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    plain = copy.deepcopy(model).eval()
    for module in (*model.modules(), *plain.modules()):
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(exact_rms_norm, module)
    return prepare(model), plain


@dataclass
class Case:
    """A forest whose old log-probs are near enough to the policy's for some ratios to be clipped and some not."""

    model: PreTrainedModel
    plain: PreTrainedModel
    rollouts: list[Rollout]
    forest: Forest
    advantage: np.ndarray
    batch: PackedBatch
    flat_logits: list[Tensor]  # per trained leaf [its tokens, V], Hugging Face's own
    flat_logprob: list[Tensor]  # per trained leaf [its response], at TEMPERATURE
    rows: list[list[int]]  # per trained leaf: packed rows of its path
    flat_loss: Tensor
    flat_gradient: Tensor

    @property
    def total(self) -> float:
        return float(sum(len(x) for x in self.flat_logprob))


SETTINGS = LossSettings(dual_clip=3.0)


def flat_case(family: str, dtype: torch.dtype, grow: Callable[..., Tree]) -> Case:
    model, plain = models(family, dtype)
    rng = np.random.default_rng(7)
    rollouts = []
    for seed in (11, 12, 13):
        tree = grow(seed, leaves=6, segment=5, vocabulary=VOCABULARY, splits=3)
        leaf = tree.leaves()[-1]
        for kept in (0, tree.response_length(leaf) // 2):  # forks that a fallback opens late, the first at the prompt
            tokens = rng.integers(0, VOCABULARY, 4).tolist()
            tree.add(tree.cut(leaf, kept), tokens, [0.0] * 4, seed=0, stop=Stop.EOS)
        rewards: list[float | None] = [1.0 for _ in tree.leaves()]
        rewards[1] = None
        rollouts.append(Rollout(str(seed), tree, rewards))
    leaves = trained_leaves(rollouts)

    flat_logits, flat_logprob, loss = [], [], torch.zeros((), dtype=dtype)
    seen: set[tuple[int, int]] = set()
    forest = Forest.of(rollouts)
    advantage = rng.integers(-16, 17, forest.path.shape) / 8
    total = float(sum(tree.response_length(leaf) for tree, leaf in leaves))
    for tree, leaf in leaves:
        ids = torch.tensor(tree.tokens(leaf))
        found = plain(input_ids=ids[None], use_cache=False).logits[0]
        flat_logits.append(found.detach())
        logprob = (found / TEMPERATURE).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0][len(tree.prompt) - 1 :]
        flat_logprob.append(logprob)
        # The rollout's log-probs: the policy's and noise, with some far off so that the dual clip acts.
        begin = 0
        for n in tree.path(leaf)[1:]:
            node = tree.nodes[n]
            now = logprob[begin : (begin := begin + len(node.tokens))].detach()
            if (id(tree), n) not in seen:
                seen.add((id(tree), n))
                noise = rng.normal(0, 0.4, len(node.tokens)) - 2.0 * (rng.random(len(node.tokens)) < 0.2)
                node.logprobs = np.float32(now.numpy() + noise).tolist()
    for row, ((tree, leaf), logprob) in enumerate(zip(leaves, flat_logprob, strict=True)):
        loss = loss + textbook_loss(tree, leaf, logprob, advantage[row]) / total
    loss.backward()
    batch = pack(rollouts, forest, fold(forest, advantage), range(len(rollouts)))
    by_tokens = {tuple(batch.token_ids[rows].tolist()): rows for rows in paths(batch)}
    rows = [by_tokens[tuple(tree.tokens(leaf))] for tree, leaf in leaves]
    gradient = flat_gradient(plain)
    return Case(
        model, plain, rollouts, forest, advantage, batch, flat_logits, flat_logprob, rows, loss.detach(), gradient
    )


def textbook_loss(tree: Tree, leaf: int, logprob: Tensor, advantage: np.ndarray) -> Tensor:
    """-min(rA, clip(r)A), at most -cA for A < 0, summed over one leaf's response."""
    path = tree.path(leaf)[1:]
    old = torch.tensor([x for n in path for x in tree.nodes[n].logprobs], dtype=logprob.dtype)
    a = torch.tensor(np.repeat(advantage[1 : len(path) + 1], [len(tree.nodes[n].tokens) for n in path])).to(logprob)
    ratio = (logprob - old).exp()
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - SETTINGS.clip_low, 1 + SETTINGS.clip_high) * a)
    return -torch.where(a < 0, torch.maximum(surrogate, SETTINGS.dual_clip * a), surrogate).sum()


def flat_gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value; NaN if there is one."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def errors(case: Case, batch: PackedBatch, plan: PlanName) -> dict[str, float]:
    """How far `batch` is from flat: in the logits of every row of every path, the log-probs, the loss, its gradient."""
    case.model.zero_grad()
    dtype = case.model.dtype
    with torch.no_grad():
        ids, positions = (torch.as_tensor(x)[None] for x in (batch.token_ids, batch.position))
        found = logits(case.model, hidden(case.model, ids, positions, plan_for(batch, plan))[0])
    logprob = logprobs(case.model, batch, temperature=TEMPERATURE, plan=plan, chunk=7)
    old, adv_pos, adv_neg, weight = (
        torch.as_tensor(x).to(dtype) for x in (batch.rollout_logprob, batch.adv_pos, batch.adv_neg, batch.weight)
    )
    loss, metrics = policy_loss(SETTINGS, logprob, old, adv_pos, adv_neg, weight, case.total)
    assert 0.1 < metrics["clip_fraction"] < 0.9 or batch is not case.batch
    loss.backward()
    response = [rows[-len(x) :] for rows, x in zip(case.rows, case.flat_logprob, strict=True)]
    return {
        "logits": np.max([worst(found[r], x) for r, x in zip(case.rows, case.flat_logits, strict=True)]),  # keeps NaN
        "logprob": np.max([worst(logprob[r], x) for r, x in zip(response, case.flat_logprob, strict=True)]),
        "loss": worst(loss.detach(), case.flat_loss),
        "gradient": worst(flat_gradient(case.model), case.flat_gradient),
    }


@pytest.mark.parametrize("plan", ["chains", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_flat_in_logits_of_every_row_in_loss_and_in_every_gradient(
    random_tree: Callable[..., Tree], family: str, dtype: torch.dtype, tolerance: float, plan: PlanName
) -> None:
    case = flat_case(family, dtype, random_tree)
    found = errors(case, case.batch, plan)
    assert all(error <= tolerance for error in found.values()), found


def summed(batch: PackedBatch) -> PackedBatch:
    total = batch.adv_pos + batch.adv_neg
    return replace(batch, adv_pos=np.maximum(total, 0), adv_neg=np.minimum(total, 0))


def rows_of(batch: PackedBatch) -> np.ndarray:
    return np.arange(len(batch))


MUTANTS = {
    "end one too far": (lambda b: replace(b, end=np.minimum(b.end + 1, len(b))), "logits", "dense"),
    "end one too near": (lambda b: replace(b, end=np.maximum(b.end - 1, rows_of(b) + 1)), "logits", "dense"),
    "end one too near, chains": (
        lambda b: replace(b, end=np.maximum(b.end - 1, rows_of(b) + 1)),
        "logits",
        "chains",
    ),
    "siblings visible": (lambda b: replace(b, end=np.full_like(b.end, len(b))), "logits", "dense"),
    "plainly causal": (lambda b: replace(b, prev=rows_of(b) - 1), "logits", "chains"),
    "predicted by the row before": (
        lambda b: replace(b, prev=np.where(b.prev < 0, -1, rows_of(b) - 1)),
        "logprob",
        "dense",
    ),
    "position of the row": (lambda b: replace(b, position=rows_of(b)), "logits", "dense"),
    "position one off in siblings": (
        lambda b: replace(b, position=b.position + (b.prev != rows_of(b) - 1)),
        "logits",
        "chains",
    ),
    "one summed advantage": (summed, "loss", "chains"),
    "old log-probs shifted": (
        lambda b: replace(b, rollout_logprob=np.roll(b.rollout_logprob, 1)),
        "gradient",
        "chains",
    ),
}


@pytest.fixture(scope="module")
def exact_case() -> Case:
    return flat_case("qwen2", torch.float64, grow_random)


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
