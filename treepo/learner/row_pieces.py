"""Cutting a packed row that is too large into pieces, so that every token is still computed exactly once.

A piece sees the key-values of its ancestors in other pieces and gives gradients back to them (`gradient`).
So the memory of a row is bounded, and nothing of a shared beginning is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo.forest import Ints
from treepo.learner.packing import PackedBatch


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `begin` to `stop` of a packed row of T tokens: whole subtrees, or a run of tokens that others hang off."""

    begin: int
    stop: int
    parent: int  # the piece whose last row these subtrees hang off, an earlier one; -1: none
    prev: Ints  # [stop - begin] `PackedBatch.prev` counted from `begin`; -1 also where that row is in another piece
    end: Ints  # [stop - begin] `PackedBatch.end` counted from `begin`
    targets: Ints  # rows of the whole whose token is trained and is predicted by a row of this piece


def pieces(batch: PackedBatch, max_tokens: int) -> list[Piece]:
    """Cut `batch` so that its depth-first pass never holds more than `max_tokens` tokens, or one path if that is more.

    Held are a piece and those it hangs off, directly or not. Whole subtrees stay together where they fit, next to each
    other if several do; of a subtree that does not fit, the run of tokens down to its first fork becomes a piece, and
    the subtrees below are taken one by one. A row of at most `max_tokens` tokens is one piece.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    if not len(batch):
        raise ValueError("a packed row needs at least one token")
    runs = _Runs(batch)
    cuts: list[tuple[int, int, int]] = []  # begin, stop, parent
    todo = [(runs.roots, -1, 0)]  # siblings in row order, what they hang off, tokens held above them
    while todo:
        siblings, parent, held = todo.pop()
        begin = stop = int(runs.first[siblings[0]])  # subtrees gathered so far
        for i, run in enumerate(siblings):
            first, end = int(runs.first[run]), int(runs.end[run])
            below = runs.children[run]
            whole = held + end - first <= max_tokens or not below
            if stop > begin and (not whole or held + end - begin > max_tokens):
                cuts.append((begin, stop, parent))
                begin = first
            stop = end
            if not whole:
                # Down the run first; the siblings after it when that is done.
                if i + 1 < len(siblings):
                    todo.append((siblings[i + 1 :], parent, held))
                fork = int(runs.stop[run])
                cuts.append((first, fork, parent))
                todo.append((below, len(cuts) - 1, held + fork - first))
                break
        else:
            cuts.append((begin, stop, parent))
    return [_piece(batch, *cut) for cut in cuts]


class _Runs:
    """The tree of *runs*: longest stretches of rows with nothing hanging off any but the last."""

    def __init__(self, batch: PackedBatch) -> None:
        rows = np.arange(len(batch))
        jumps = (batch.prev != rows - 1) | (batch.prev < 0)
        starts = jumps.copy()
        after_fork = batch.prev[jumps & (batch.prev >= 0)] + 1
        starts[after_fork] = True
        self.first = np.flatnonzero(starts)  # [R]
        self.stop = np.append(self.first[1:], len(batch))  # [R] row just past the run
        self.end = batch.end[self.first]  # [R] row just past its subtree
        parent = np.searchsorted(self.first, batch.prev[self.first], side="right") - 1
        self.children: list[list[int]] = [[] for _ in self.first]
        self.roots: list[int] = []
        for run, (above, prev) in enumerate(zip(parent.tolist(), batch.prev[self.first].tolist(), strict=True)):
            (self.children[above] if prev >= 0 else self.roots).append(run)


def _piece(batch: PackedBatch, begin: int, stop: int, parent: int) -> Piece:
    inside = (batch.prev >= begin) & (batch.prev < stop)
    prev = batch.prev[begin:stop]
    return Piece(
        begin,
        stop,
        parent,
        np.where(prev >= begin, prev - begin, -1),
        np.minimum(batch.end[begin:stop], stop) - begin,
        np.flatnonzero(inside & (batch.weight > 0)),
    )


def tokens_held(cut: Sequence[Piece]) -> Ints:
    """Tokens [pieces] that a pass over the pieces holds with each of them: its own, and those of what it hangs off."""
    held = np.zeros(len(cut), np.int64)
    for i, piece in enumerate(cut):
        held[i] = piece.stop - piece.begin + (held[piece.parent] if piece.parent >= 0 else 0)
    return held
