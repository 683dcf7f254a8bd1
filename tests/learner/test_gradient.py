"""A row in pieces: every token in one piece, never more held than allowed, and the gradient that of the whole row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.packed_oracle import EVERYTHING, FAMILIES, Case, errors_in_pieces, flat_case
from tests.support.random_trees import grow_random
from treepo.forest import Forest
from treepo.learner.gradient import backward_row
from treepo.learner.loss import PolicyLoss
from treepo.learner.packing import PackedBatch, fold, pack_row
from treepo.learner.row_pieces import Piece, pieces, tokens_held
from treepo.models import causal_lm
from treepo.models.attention import visible
from treepo.tree import ScoredTree, Stop, Tree


def row_of(*trees: Tree) -> PackedBatch:
    forest = Forest.of([ScoredTree(str(t), tree, [1.0] * len(tree.leaves())) for t, tree in enumerate(trees)])
    return pack_row(forest, fold(forest, np.zeros(forest.path.shape)), range(len(trees)))


def above(parts: list[Piece], piece: Piece) -> list[Piece]:
    """The pieces that `piece` hangs off, the first of all first."""
    found = []
    while piece.parent >= 0:
        piece = parts[piece.parent]
        found.append(piece)
    return found[::-1]


@given(seed=st.integers(0, 10**6), max_tokens=st.integers(1, 90), trees=st.integers(1, 3))
def test_pieces_are_a_partition_in_which_each_row_sees_what_it_saw(seed: int, max_tokens: int, trees: int) -> None:
    batch = row_of(*(grow_random(seed + t, leaves=9) for t in range(trees)))
    parts = pieces(batch, max_tokens)
    rows = np.arange(len(batch))
    assert [row for piece in parts for row in range(piece.begin, piece.stop)] == rows.tolist()
    assert sorted(t for piece in parts for t in piece.targets) == np.flatnonzero(batch.weight > 0).tolist()
    for i, piece in enumerate(parts):
        assert piece.parent < i
        past = [row for held in above(parts, piece) for row in range(held.begin, held.stop)]
        own = np.arange(piece.stop - piece.begin)
        for q in own:
            seen = [*past, *(own[visible(q, own, piece.end)] + piece.begin)]
            assert seen == np.flatnonzero(visible(q + piece.begin, rows, batch.end)).tolist()
        inside = batch.prev[piece.begin : piece.stop] >= piece.begin
        assert (piece.prev[inside] + piece.begin == batch.prev[piece.begin : piece.stop][inside]).all()
        assert (piece.prev[~inside] == -1).all()
        assert (piece.end <= len(own)).all()
        assert all(piece.begin <= batch.prev[t] < piece.stop for t in piece.targets)
    longest = int(batch.position.max()) + 1
    assert int(tokens_held(parts).max()) <= max(max_tokens, longest)
    if len(batch) <= max_tokens:
        assert len(parts) == 1


def test_the_tree_drawn_by_hand() -> None:
    #  [0 1] -+- [2 3] -+- [4 5]
    #         |         `- [6]
    #         |- [7 8]
    #         `- [9]
    tree = Tree([0, 1])
    fork = tree.add(0, [2, 3], [0.0] * 2, seed=1)
    tree.add(fork, [4, 5], [0.0] * 2, seed=2, stop=Stop.EOS)
    tree.add(fork, [6], [0.0], seed=3, stop=Stop.EOS)
    tree.add(0, [7, 8], [0.0] * 2, seed=4, stop=Stop.EOS)
    tree.add(0, [9], [0.0], seed=5, stop=Stop.EOS)
    batch = row_of(tree)

    def spans(max_tokens: int) -> list[tuple[int, int, int]]:
        return [(piece.begin, piece.stop, piece.parent) for piece in pieces(batch, max_tokens)]

    assert spans(10) == [(0, 10, -1)]
    assert spans(9) == [(0, 2, -1), (2, 9, 0), (9, 10, 0)]
    assert spans(7) == [(0, 2, -1), (2, 7, 0), (7, 10, 0)]
    assert spans(6) == [(0, 2, -1), (2, 4, 0), (4, 6, 1), (6, 7, 1), (7, 10, 0)]
    assert spans(1) == [(0, 2, -1), (2, 4, 0), (4, 6, 1), (6, 7, 1), (7, 9, 0), (9, 10, 0)]
    assert [piece.targets.tolist() for piece in pieces(batch, 6)] == [[2, 7, 9], [3, 4, 6], [5], [], [8]]
    assert [int(tokens_held(pieces(batch, n)).max()) for n in (10, 9, 7, 6, 1)] == [10, 9, 7, 6, 6]
    with pytest.raises(ValueError, match="max_tokens"):
        pieces(batch, 0)


# The oracle


@pytest.fixture(scope="module")
def exact_case() -> Case:
    return flat_case("qwen2", torch.float64, grow_random, EVERYTHING)


@pytest.mark.parametrize("plan", ["auto", "chains", "reference"])
@pytest.mark.parametrize("max_tokens", [1, 12, 30, 10**6])
def test_the_gradient_does_not_depend_on_max_tokens(exact_case: Case, max_tokens: int, plan: str) -> None:
    found = errors_in_pieces(exact_case, max_tokens, plan)
    assert all(error <= 1e-7 for error in found.values()), found  # the folded columns are float32


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_flat_in_float32_in_every_family(family: str, random_tree: Callable[..., Tree]) -> None:
    found = errors_in_pieces(flat_case(family, torch.float32, random_tree), 12)
    assert all(error <= 1e-5 for error in found.values()), found


def test_activation_checkpointing_computes_twice_and_changes_nothing(random_tree: Callable[..., Tree]) -> None:
    case = flat_case("qwen3", torch.float64, random_tree)
    before = errors_in_pieces(case, 12)
    causal_lm.checkpoint_activations(case.model)
    calls = []
    case.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    assert errors_in_pieces(case, 12) == pytest.approx(before, rel=0, abs=1e-12)
    assert len(calls) == 2 * len(pieces(case.batch, 12))
    assert not any(m.training for m in case.model.modules() if isinstance(m, torch.nn.Linear))


def test_autocast_is_entered_for_the_forward_pass_and_stays_near(random_tree: Callable[..., Tree]) -> None:
    # Without clips, at whose edges a gradient jumps.
    smooth = PolicyLoss(clip_low=0.999, clip_high=1e9, dual_clip=1e9)
    case = flat_case("qwen2", torch.float32, random_tree, smooth)
    found = errors_in_pieces(case, 12, forward=lambda: torch.autocast("cpu", torch.bfloat16))
    assert 1e-4 < found["gradient"] < 0.1
    assert all(p.grad.dtype == torch.float32 for p in case.model.parameters())


def test_no_more_pieces_wait_for_their_backward_pass_than_promised(random_tree: Callable[..., Tree]) -> None:
    case = flat_case("llama", torch.float32, random_tree)
    parts = pieces(case.batch, 12)
    waiting: dict[int, int] = {}  # piece -> its tokens
    held = []

    def loss(rows: np.ndarray, logprob: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        i = len(held)
        assert rows.tolist() == parts[i].targets.tolist()
        waiting[i] = parts[i].stop - parts[i].begin
        held.append(sum(waiting.values()))
        logprob.register_hook(lambda _: waiting.pop(i) and None)
        return logprob.sum()

    backward_row(case.model, case.batch, loss, max_tokens=12)
    assert max(held) == int(tokens_held(parts).max()) < len(case.batch) / 2
    assert not waiting
