"""The oracle of packed passes: one plain row per leaf through Hugging Face's own model, and the textbook loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from treepo.forest import Forest, Ints
from treepo.learner.gradient import backward_row, logprobs
from treepo.learner.loss import PolicyLoss, policy_loss
from treepo.learner.packing import PackedBatch, fold, pack_row
from treepo.models.attention import PlanName, plan_for, visible
from treepo.models.causal_lm import hidden, logits, prepare
from treepo.tree import ScoredTree, Stop, Tree

VOCABULARY = 30
TEMPERATURE = 0.7
FAMILIES = {
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "mistral": partial(MistralConfig, sliding_window=None),
    "gemma": GemmaConfig,
}


def trained_leaves(trees: Sequence[ScoredTree]) -> list[tuple[Tree, int]]:
    return [
        (scored.tree, leaf)
        for scored in trees
        for leaf, reward in zip(scored.tree.leaves(), scored.rewards, strict=True)
        if reward is not None
    ]


def paths(batch: PackedBatch) -> list[list[int]]:
    """The rows of each leaf's path, read from `end` alone: a row with nothing below it is the end of a leaf."""
    rows = np.arange(len(batch))
    return [np.flatnonzero(visible(t, rows, batch.end)).tolist() for t in rows[batch.end == rows + 1]]


def exact_rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Hugging Face's is in float32 whatever the model."""
    gemma = hasattr(module, "eps")
    eps, weight = (module.eps, 1 + module.weight) if gemma else (module.variance_epsilon, module.weight)
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


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


SETTINGS = PolicyLoss(dual_clip=3.0)
EVERYTHING = PolicyLoss(dual_clip=3.0, shared_tokens="sqrt", kl=0.3, rollout_cap=1.2)


@dataclass
class Case:
    """A forest whose old log-probs are near enough to the policy's for some ratios to be clipped and some not."""

    settings: PolicyLoss
    model: PreTrainedModel
    plain: PreTrainedModel
    trees: list[ScoredTree]
    forest: Forest
    advantage: np.ndarray
    batch: PackedBatch
    old: np.ndarray  # [T]
    reference: np.ndarray  # [T]
    rows: list[list[int]]  # per trained leaf: packed rows of its path
    flat_logits: list[Tensor]  # per trained leaf [its tokens, V], Hugging Face's own
    flat_logprob: list[Tensor]  # per trained leaf [its response], at TEMPERATURE
    flat_entropy: Tensor  # scalar: mean over all pairs
    flat_loss: Tensor
    flat_gradient: Tensor
    total: float


def flat_case(family: str, dtype: torch.dtype, grow: Callable[..., Tree], loss: PolicyLoss = SETTINGS) -> Case:
    model, plain = models(family, dtype)
    rng = np.random.default_rng(7)
    trees = [_scored_tree(grow, seed, rng) for seed in (11, 12, 13)]
    leaves = trained_leaves(trees)
    forest = Forest.of(trees)
    advantage = rng.integers(-16, 17, forest.path.shape) / 8
    batch = pack_row(forest, fold(forest, advantage, loss.shared_tokens), range(len(trees)))
    by_tokens = {tuple(batch.token_ids[rows].tolist()): rows for rows in paths(batch)}
    rows = [by_tokens[tuple(tree.tokens(leaf))] for tree, leaf in leaves]

    flat_logits, flat_logprob, entropies = [], [], []
    now = np.zeros(len(batch))
    for (tree, leaf), path in zip(leaves, rows, strict=True):
        ids = torch.tensor(tree.tokens(leaf))
        found = plain(input_ids=ids[None], use_cache=False).logits[0]
        flat_logits.append(found.detach())
        everything = (found / TEMPERATURE).log_softmax(-1)[len(tree.prompt) - 1 : -1]
        response = path[len(tree.prompt) :]
        flat_logprob.append(everything.gather(-1, ids[len(tree.prompt) :, None])[:, 0])
        entropies.append(-(everything.exp() * everything).sum(-1).detach())
        now[response] = flat_logprob[-1].detach().numpy()

    def near(spread: float) -> np.ndarray:
        return np.float32(now + (batch.weight > 0) * rng.normal(0, spread, len(now)))

    # Some old log-probs far off, so that the dual clip acts.
    old = near(0.4) - np.float32(2.0 * ((batch.weight > 0) & (rng.random(len(now)) < 0.2)))
    batch = replace(batch, rollout_logprob=np.float32(old + near(0.3) - now))
    reference = near(0.5)
    leaf_count = {n: int(k) for n, k in enumerate(forest.leaf_count)}
    value = total = entropy = torch.zeros((), dtype=dtype)
    for row, ((tree, leaf), logprob) in enumerate(zip(leaves, flat_logprob, strict=True)):
        path = tree.path(leaf)[1:]
        lengths = [len(tree.nodes[n].tokens) for n in path]
        response = rows[row][len(tree.prompt) :]
        others = (torch.tensor(x[response]).to(dtype) for x in (old, batch.rollout_logprob, reference))
        k = np.repeat([leaf_count[n] for n in forest.path[row, 1 : len(path) + 1]], lengths)
        weight = torch.tensor(k ** {"sum": 0.0, "sqrt": -0.5, "mean": -1.0}[loss.shared_tokens]).to(dtype)
        a = torch.tensor(np.repeat(advantage[row, 1 : len(path) + 1], lengths)).to(dtype)
        value = value + (weight * textbook_loss(loss, logprob, *others, a)).sum()
        entropy = entropy + (weight * entropies[row]).sum()
        total = total + weight.sum()
    (value / total).backward()
    return Case(
        loss,
        model,
        plain,
        trees,
        forest,
        advantage,
        batch,
        old,
        reference,
        rows,
        flat_logits,
        flat_logprob,
        entropy / total,
        (value / total).detach(),
        flat_gradient(plain),
        float(total),
    )


def _scored_tree(grow: Callable[..., Tree], seed: int, rng: np.random.Generator) -> ScoredTree:
    tree = grow(seed, leaves=6, segment=5, vocabulary=VOCABULARY, splits=3)
    leaf = tree.leaves()[-1]
    for kept in (0, tree.response_length(leaf) // 2):  # forks that a fallback opens late, the first at the prompt
        tokens = rng.integers(0, VOCABULARY, 4).tolist()
        tree.add(tree.node_after(leaf, kept), tokens, [0.0] * 4, seed=0, stop=Stop.EOS)
    rewards: list[float | None] = [1.0 for _ in tree.leaves()]
    rewards[1] = None
    return ScoredTree(str(seed), tree, rewards)


def textbook_loss(
    settings: PolicyLoss, logprob: Tensor, old: Tensor, rollout: Tensor, reference: Tensor, a: Tensor
) -> Tensor:
    """Per token of a leaf: -min(rA, clip(r)A), at most -cA for A < 0, corrected and regularised as asked."""
    ratio = (logprob - old).exp()
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * a)
    cost = -torch.where(a < 0, torch.maximum(surrogate, settings.dual_clip * a), surrogate)
    if settings.rollout_cap is not None:
        cost = cost * torch.minimum((old - rollout).exp(), torch.tensor(settings.rollout_cap))
    return cost + settings.kl * ((reference - logprob).exp() - (reference - logprob) - 1)


def flat_gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value; NaN if there is one."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def packed_loss(case: Case, batch: PackedBatch, rows: Ints, logprob: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `rows` of `batch`, whose log-probs are `logprob`."""
    columns = (case.old, batch.adv_pos, batch.adv_neg, batch.weight, batch.rollout_logprob, case.reference)
    old, pos, neg, weight, rollout, reference = (torch.as_tensor(x[rows]).to(logprob.dtype) for x in columns)
    return policy_loss(
        case.settings,
        logprob,
        old,
        pos,
        neg,
        weight,
        case.total,
        rollout_logprob=rollout,
        reference_logprob=reference if case.settings.kl else None,
    )


def errors(case: Case, batch: PackedBatch, plan: PlanName) -> dict[str, float]:
    """How far `batch` is from flat: in the logits of every row of every path, the log-probs, the loss, its gradient."""
    case.model.zero_grad()
    with torch.no_grad():
        ids, positions = (torch.as_tensor(x)[None] for x in (batch.token_ids, batch.position))
        found = logits(case.model, hidden(case.model, ids, positions, plan_for(batch.prev, batch.end, name=plan))[0])
    logprob = logprobs(case.model, batch, temperature=TEMPERATURE, plan=plan, chunk=7)
    loss, metrics = packed_loss(case, batch, np.arange(len(batch)), logprob)
    assert 0.1 < metrics["clip/fraction"] < 0.9 or batch is not case.batch
    loss.backward()
    response = [rows[-len(x) :] for rows, x in zip(case.rows, case.flat_logprob, strict=True)]
    return {
        "logits": np.max([worst(found[r], x) for r, x in zip(case.rows, case.flat_logits, strict=True)]),  # keeps NaN
        "logprob": np.max([worst(logprob[r], x) for r, x in zip(response, case.flat_logprob, strict=True)]),
        "loss": worst(loss.detach(), case.flat_loss),
        "gradient": worst(flat_gradient(case.model), case.flat_gradient),
    }


def errors_in_pieces(
    case: Case,
    max_tokens: int,
    plan: PlanName = "auto",
    forward: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """How far the pass in pieces is from flat: in the loss, the mean entropy and the gradient."""
    case.model.zero_grad()
    value, entropies, seen = torch.zeros(()), torch.zeros(()), []

    def loss(rows: Ints, logprob: Tensor, entropy: Tensor) -> Tensor:
        nonlocal value, entropies
        part, _ = packed_loss(case, case.batch, rows, logprob)
        value = value + part.detach()
        entropies = entropies + (torch.as_tensor(case.batch.weight[rows]) * entropy).sum() / case.total
        seen.extend(rows.tolist())
        return part

    backward_row(
        case.model, case.batch, loss, max_tokens=max_tokens, temperature=TEMPERATURE, plan=plan, forward=forward
    )
    assert sorted(seen) == np.flatnonzero(case.batch.weight > 0).tolist()
    return {
        "loss": worst(value, case.flat_loss),
        "entropy": worst(entropies, case.flat_entropy),
        "gradient": worst(flat_gradient(case.model), case.flat_gradient),
    }
