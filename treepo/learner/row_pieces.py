"""Dividing a packed row that is too large into pieces, so that every token is still computed exactly once.

A piece sees the keys and values of its ancestors in other pieces, and gives gradients back to them (`gradient`). So the
memory of a row is bounded, and no shared token is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo.forest import Ints
from treepo.learner.packing import PackedBatch
from treepo.models.attention import chain_starts


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `begin` to `stop` of a packed row of T tokens: whole subtrees, or a run of tokens that others hang off."""

    begin: int
    stop: int
    parent: int  # index of the piece whose last row these subtrees hang off, always an earlier piece; -1: none
    prev: Ints  # [stop - begin] `PackedBatch.prev` counted from `begin`; -1 also where that row is in another piece
    end: Ints  # [stop - begin] `PackedBatch.end` counted from `begin`
    targets: Ints  # rows of the packed row whose token is trained and is predicted by a row of this piece


def pieces(batch: PackedBatch, max_tokens: int) -> list[Piece]:
    """Divide `batch` so that its depth-first pass never holds more than `max_tokens` tokens, or one path if longer.

    A pass holds the current piece, the piece that it hangs off, the piece that this one hangs off, and so on. Subtrees
    stay whole where they fit. Neighbours share a piece if they fit together. Of a subtree that does not fit, the run of
    tokens down to its first fork becomes a piece, and the subtrees below the fork are divided in the same way. A row of
    at most `max_tokens` tokens is one piece.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    if not len(batch):
        raise ValueError("a packed row needs at least one token")
    runs = _Runs(batch)
    spans: list[tuple[int, int, int]] = []  # begin, stop, parent
    todo = [(runs.roots, -1, 0)]  # siblings in row order, the piece that they hang off, tokens held above them
    while todo:
        siblings, parent, held = todo.pop()
        begin = stop = int(runs.first[siblings[0]])  # subtrees gathered so far
        for i, run in enumerate(siblings):
            first, end = int(runs.first[run]), int(runs.end[run])
            below = runs.children[run]
            whole = held + end - first <= max_tokens or not below
            if stop > begin and (not whole or held + end - begin > max_tokens):
                spans.append((begin, stop, parent))
                begin = first
            stop = end
            if not whole:
                # What is below this run comes first, and then the siblings after it.
                if i + 1 < len(siblings):
                    todo.append((siblings[i + 1 :], parent, held))
                fork = int(runs.stop[run])
                spans.append((first, fork, parent))
                todo.append((below, len(spans) - 1, held + fork - first))
                break
        else:
            spans.append((begin, stop, parent))
    return [_piece(batch, *span) for span in spans]


class _Runs:
    """The tree of *runs*. A run is a longest stretch of a chain in which nothing hangs off any row but the last."""

    def __init__(self, batch: PackedBatch) -> None:
        starts = chain_starts(batch.prev)
        forks = batch.prev[starts]
        self.first = np.union1d(starts, forks[forks >= 0] + 1)  # [R]
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


def tokens_held(row: Sequence[Piece]) -> Ints:
    """Tokens [pieces] that a pass over the pieces of a row holds at each of them: its own, and those it hangs off."""
    held = np.zeros(len(row), np.int64)
    for i, piece in enumerate(row):
        held[i] = piece.stop - piece.begin + (held[piece.parent] if piece.parent >= 0 else 0)
    return held
