"""GSPO (arXiv 2507.18071) on packed tokens against its definition, one leaf at a time, on trees of every odd shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.random_trees import grow_random
from treepo.forest import Forest
from treepo.learner.loss import GSPO, Responses, TrainedTokens
from treepo.learner.packing import PackedBatch, Totals, fold, pack_row
from treepo.tree import ROOT, ScoredTree, Stop, Tree

WIDE = GSPO(clip_low=0.05, clip_high=0.1)  # so that some responses are clipped and some are not


def odd_tree(seed: int) -> ScoredTree:
    """Nodes that were not sampled, a leaf of one token, and leaves that failed without a token but have a reward."""
    rng = Random(seed)
    tree = grow_random(seed, leaves=7, segment=5, splits=2)
    tree.add(ROOT, [1], [-1.0], seed=1, stop=Stop.EOS)
    for node in tree.nodes[1:]:
        if rng.random() < 0.3:
            node.sampled, node.logprobs, node.entropies = False, [], None
    inner = [n for n, node in enumerate(tree.nodes) if node.stop is None]
    for _ in range(rng.randint(0, 3)):
        tree.add(rng.choice(inner), [], [], seed=0, stop=Stop.ERROR)
    return ScoredTree(str(seed), tree, [None if rng.random() < 0.2 else rng.random() for _ in tree.leaves()])


class Row:
    """A packed row of odd trees, with random log-probs and an advantage for each leaf and node."""

    def __init__(self, *trees: ScoredTree, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.forest = Forest.of(trees)
        self.advantage = rng.integers(-8, 9, self.forest.path.shape) / 8
        self.batch = pack_row(self.forest, fold(self.forest, self.advantage), range(len(trees)))
        self.rows = np.flatnonzero(self.batch.weight > 0)
        self.logprob = torch.tensor(-rng.random(len(self.rows)), requires_grad=True)
        self.old = self.logprob.detach() - torch.tensor(rng.normal(0, 0.2, len(self.rows)))

    def packed(self, batch: PackedBatch, change: Callable[[Responses], Responses]) -> Tensor:
        tokens = TrainedTokens.of(batch, self.rows, self.logprob, responses=True)
        tokens = replace(tokens, old_logprob=self.old, responses=change(tokens.responses))
        return WIDE(tokens, Totals.of([self.batch]))[0]

    def by_definition(self, *, count_tools: bool = False) -> Tensor:
        """-1/G sum over leaves of 1/|y| sum over tokens of min(s A, clip(s) A): eq. 13, s with the gradient of eq. 14.

        The tokens of a leaf are found by the forest alone: of the packed row, only the order of its nodes is used.
        """
        first = {}  # node of the forest -> number of its first trained token
        numbers = np.full(len(self.batch), -1)
        numbers[self.rows] = np.arange(len(self.rows))
        packed = {}  # node of the forest -> packed node
        for path, leaf in zip(self.forest.path, self.batch.leaves.path, strict=True):
            packed.update(zip(path.tolist(), leaf.tolist(), strict=True))
        for node, n in packed.items():
            rows = np.flatnonzero((self.batch.node == n) & (self.batch.weight > 0))
            first[node] = int(numbers[rows[0]]) if len(rows) else 0
        total = torch.zeros((), dtype=torch.float64)
        for leaf, path in enumerate(self.forest.path.tolist()):
            nodes = [n for n in path[1:] if n >= 0]
            which = [first[n] + i for n in nodes for i in range(self.forest.length[n])]
            if not which:
                continue
            a = np.repeat(self.advantage[leaf, 1 : len(nodes) + 1], self.forest.length[nodes])
            ratios = self.logprob[which] - self.old[which]
            length = len(self.tokens_of(nodes)) if count_tools else len(which)
            s = (ratios.sum() / length).exp().detach() * (self.logprob[which] - self.logprob[which].detach()).exp()
            a = torch.tensor(a)
            total = total + torch.minimum(s * a, s.clamp(1 - WIDE.clip_low, 1 + WIDE.clip_high) * a).sum() / length
        return -total / len(self.forest.leaf)

    def tokens_of(self, nodes: list[int]) -> list[int]:
        """All tokens of these nodes, those of tools too."""
        every = [node for scored in self.forest.trees for node in scored.tree.nodes]
        return [token for n in nodes for token in every[n].tokens]

    def errors(
        self,
        batch: PackedBatch | None = None,
        change: Callable[[Responses], Responses] = lambda responses: responses,
        *,
        count_tools: bool = False,
    ) -> tuple[float, float]:
        """How far the packed loss and its gradient by the log-probs are from the definition."""
        found, expected = self.packed(batch or self.batch, change), self.by_definition(count_tools=count_tools)
        gradients = [torch.autograd.grad(loss, self.logprob, allow_unused=True)[0] for loss in (found, expected)]
        gradient = [torch.zeros_like(self.logprob) if g is None else g for g in gradients]
        return abs(found.item() - expected.item()), (gradient[0] - gradient[1]).abs().max().item()


@given(seed=st.integers(0, 10**6), trees=st.integers(1, 4))
def test_gspo_equals_its_definition_on_odd_trees(seed: int, trees: int) -> None:
    row = Row(*(odd_tree(seed + t) for t in range(trees)), seed=seed)
    if len(row.rows):
        assert max(row.errors()) <= 1e-12


MUTANTS: dict[str, Callable[[Responses], Responses]] = {
    "leaves with each other's paths": lambda r: replace(r, path=r.path.roll(1, 0)),
    "leaves with each other's advantages": lambda r: replace(r, advantage=r.advantage.roll(1, 0)),
    "nodes that are longer": lambda r: replace(r, length=torch.cat([r.length[:-1] + 1, r.length[-1:]])),
    "tokens of the next node": lambda r: replace(r, node=r.node.roll(1)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_definition_rejects(mutant: str) -> None:
    assert max(Row(odd_tree(1), odd_tree(2)).errors(change=MUTANTS[mutant])) > 1e-3


def test_the_length_of_a_response_counts_sampled_tokens_only() -> None:
    row = Row(odd_tree(1), odd_tree(2))
    assert max(row.errors()) <= 1e-12
    assert max(row.errors(count_tools=True)) > 1e-3


def test_failed_leaves_without_a_token_that_have_a_reward_are_responses_of_length_zero() -> None:
    tree = Tree([1, 2])
    tree.add(ROOT, [3, 4], [-1.0, -1.0], seed=1, stop=Stop.EOS)
    for seed in (2, 3):
        tree.add(ROOT, [], [], seed=seed, stop=Stop.ERROR)
    row = Row(ScoredTree("p", tree, [1.0, 0.0, 0.0]))
    assert row.batch.leaves.path.max() > row.batch.node.max() + 1  # the last packed nodes are in no row
    assert max(row.errors()) <= 1e-12
