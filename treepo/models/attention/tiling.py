"""The cheapest way to cover the visible pairs of a packed row with tiles: blocks on the diagonal, rectangles below it.

Letters: T tokens of a row, R steps of a chain (`_divided`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from treepo.models.attention.plan import Ints, chain_starts

# Costs in (query, key) pairs, measured forward and backward on one x86 core at H x d of 64 to 900 (0.25 to 0.5 ns a
# pair and H x d). They decide which tiles are taken. They never change the result.
CALL = 2000  # a tile, however small
QUERY = 50  # a query of a tile, beside its pairs: the kernel's own overhead, and merging
KEY = 4  # a key of a tile
KERNEL_KEYS = 512  # keys that the kernel takes at once; it skips those wholly above the diagonal of a causal block
CHUNK = 128  # where nothing forks, a chain may be divided every so many rows


@dataclass(frozen=True)
class Tiling:
    """Tiles that hold each visible pair of the rows `begin` to `stop` exactly once, and what they cost together."""

    begin: int
    stop: int
    cost: float
    causal: tuple[tuple[int, int], ...] = ()  # blocks of rows from, to: part of a chain, plainly causal
    masked: tuple[tuple[int, int], ...] = ()  # blocks of rows from, to: subtrees, under a mask
    rectangles: tuple[tuple[int, int, int, int], ...] = ()  # all queries from, to see all keys from, to


def tiling_of(prev: Ints, end: Ints) -> Tiling:
    """The cheapest tiles of the row that has these `PackedBatch.prev` and `end` [T].

    A *chain* is a longest run of rows in which each row predicts the next one. There are three kinds of tiles:

    - A causal block holds a part of a chain. A chain may be divided into blocks at its forks and every `CHUNK` rows.
    - A rectangle holds the pairs of a block with what comes below it. All rows below the end of a block are one
      contiguous range, and they see the whole block. At a fork inside a block, the rows of the fork's other children
      are contiguous too, and they see the block up to the fork.
    - A masked block holds a whole subtree, or several neighbours below one row. It computes pairs that the mask hides,
      and is cheaper than many small tiles.
    """
    first = chain_starts(prev)
    hung: dict[int, list[int]] = {}  # row -> first rows of the chains that it predicts, in order; -1: of the trees
    for begin, fork in zip(first.tolist(), prev[first].tolist(), strict=True):
        hung.setdefault(fork, []).append(begin)
    forks = np.array(sorted(hung), np.int64)
    best: dict[int, Tiling] = {}  # first row of a chain -> the tiling of its subtree
    large, covered = [], 0
    for begin, stop in pairwise([*first.tolist(), len(prev)]):
        if begin < covered:
            continue
        size = int(end[begin]) - begin
        if size * size > CALL:
            large.append((begin, stop))
        else:  # One tile is the least, so nothing inside can be cheaper.
            covered = begin + size
            best[begin] = _whole(begin, covered, masked=stop < covered)
    # Children come after their parents. From the back, the tilings of the children are known before the parent's.
    for begin, stop in reversed(large):
        inside = forks[np.searchsorted(forks, begin) : np.searchsorted(forks, stop)].tolist()
        lights = {fork: _together([best[light] for light in hung[fork]]) for fork in inside}
        best[begin] = min(
            _divided(begin, stop, lights, end),
            _whole(begin, int(end[begin]), masked=bool(lights)),
            key=lambda tiling: tiling.cost,
        )
    return _together([best[begin] for begin in hung[-1]])


def _divided(begin: int, stop: int, lights: dict[int, Tiling], end: Ints) -> Tiling:
    """The cheapest tiling of a chain, of what hangs off it, and of what the one sees of the other.

    The chain has the rows `begin` to `stop`. `lights`: for each row of the chain that is a fork, the tiling of the
    fork's other children. The chain consists of R steps, from one edge to the next: an edge is a row before which a
    block may end. The search goes over the edges from the last to the first.
    """
    edges = [begin]
    for corner in (*(fork + 1 for fork in lights), stop):
        base, parts = edges[-1], -(-(corner - edges[-1]) // CHUNK)
        edges += [base + (corner - base) * (part + 1) // parts for part in range(parts)]
    starts, inner = np.array(edges[:-1]), np.array(edges[1:-1], np.int64)  # [R], [R - 1]
    below = end[inner - 1]  # [R - 1] the rows from an edge to here are below it
    light = np.array([lights[edge - 1].begin if edge - 1 in lights else 0 for edge in edges[1:-1]], np.int64)
    keys = inner[:, None] - starts  # [R - 1, R] rows of a block that begins with the step and reaches the edge
    end_block = _triangle(keys) + _rectangle((below - inner)[:, None], keys)
    go_on = np.where((light > 0)[:, None], _rectangle((below - light)[:, None], keys), 0.0)
    # [i] least cost of the chain from the edge on, if the current block began with step i
    rest = _triangle(stop - starts)
    ending_is_cheaper = []
    for j in reversed(range(len(inner))):
        if_ended, if_not = end_block[j, : j + 1] + rest[j + 1], go_on[j, : j + 1] + rest[: j + 1]
        ending_is_cheaper.append(if_ended < if_not)
        rest = np.minimum(if_ended, if_not)
    causal, rectangles, start = [], [], 0
    for j, ended in enumerate(reversed(ending_is_cheaper)):
        first, edge, last = edges[start], edges[j + 1], int(below[j])
        if ended[start]:
            causal.append((first, edge))
            rectangles.append((edge, last, first, edge))
            start = j + 1
        elif light[j]:
            rectangles.append((int(light[j]), last, first, edge))
    causal.append((edges[start], stop))
    return _joined([Tiling(begin, stop, float(rest[0]), tuple(causal), (), tuple(rectangles)), *lights.values()])


def _whole(begin: int, stop: int, *, masked: bool) -> Tiling:
    size, rows = stop - begin, ((begin, stop),)
    if masked:
        return Tiling(begin, stop, _rectangle(size, size), masked=rows)
    return Tiling(begin, stop, _triangle(size), causal=rows)


def _together(neighbours: Sequence[Tiling]) -> Tiling:
    """The tiling of neighbouring subtrees. Some of them share a masked block where that is cheaper."""
    groups = [neighbours[0]]
    for subtree in neighbours[1:]:
        block = _whole(groups[-1].begin, subtree.stop, masked=True)
        if block.cost < groups[-1].cost + subtree.cost:
            groups[-1] = block
        else:
            groups.append(subtree)
    return _joined(groups)


def _joined(parts: Sequence[Tiling]) -> Tiling:
    return Tiling(
        parts[0].begin,
        max(part.stop for part in parts),
        sum(part.cost for part in parts),
        *(
            tuple(chain.from_iterable(getattr(part, kind) for part in parts))
            for kind in ("causal", "masked", "rectangles")
        ),
    )


def _rectangle(queries: Any, keys: Any) -> Any:
    return CALL + QUERY * queries + KEY * keys + queries * keys


def _triangle(rows: Any) -> Any:
    return CALL + (QUERY + KEY) * rows + rows * np.minimum(rows, (rows + KERNEL_KEYS) / 2)
