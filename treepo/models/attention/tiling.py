"""Where to cut a packed row into blocks on the diagonal and rectangles under it: the cheapest way.

Letters: T tokens of a row, C chains, R runs of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from treepo.models.attention.plan import Ints

# Costs in (query, key) pairs, measured forward and backward on one x86 core at H x d of 64 to 900 (0.25 to 0.5 ns a
# pair and H x d). They decide where chains are cut, never what is computed.
CALL = 2000  # a piece, however small
QUERY = 50  # a query of a piece, beside its pairs: the kernel's own overhead, and merging
KEY = 4  # a key of a piece
TILE = 512  # keys that the kernel takes at once; of a causal block it leaves out the tiles wholly above the diagonal
CHUNK = 128  # where nothing forks, a chain may be cut every so many rows


@dataclass(frozen=True)
class Cuts:
    """Pieces that hold each pair of rows `begin` to `stop` that `visible` allows once, and what they cost."""

    begin: int
    stop: int
    cost: float
    chains: tuple[tuple[int, int], ...] = ()  # causal blocks of rows from, to
    subtrees: tuple[tuple[int, int], ...] = ()  # blocks of rows from, to, under a mask
    rectangles: tuple[tuple[int, int, int, int], ...] = ()  # all queries from, to see all keys from, to


def cuts_of(prev: Ints, end: Ints) -> Cuts:
    """The cheapest pieces of the row that has these `PackedBatch.prev` and `end` [T].

    A *chain* is a longest run of rows each predicted by the row before it. It may be cut at its forks and every `CHUNK`
    rows. Up to a cut it is a causal block, and what is below the cut, a contiguous range of rows, sees that block as a
    rectangle. At a fork where the chain is not cut, only the other children's rows, contiguous too, see it so far. A
    subtree, or several next to each other below one row, may instead be one block under a mask.
    """
    first = np.flatnonzero((prev != np.arange(len(prev)) - 1) | (prev < 0))  # [C]
    hung: dict[int, list[int]] = {}  # row -> first rows of the chains that it predicts, in order; -1: of the trees
    for begin, fork in zip(first.tolist(), prev[first].tolist(), strict=True):
        hung.setdefault(fork, []).append(begin)
    forks = np.array(sorted(hung), np.int64)
    best: dict[int, Cuts] = {}  # of the subtree of the chain with this first row
    large, covered = [], 0
    for begin, stop in pairwise([*first.tolist(), len(prev)]):
        if begin < covered:
            continue
        size = int(end[begin]) - begin
        if size * size > CALL:
            large.append((begin, stop))
        else:  # one call is the least, so there is no need to look inside
            covered = begin + size
            best[begin] = _whole(begin, covered, masked=stop < covered)
    # Children come after their parents, so from the back theirs are known when a parent's are sought.
    for begin, stop in reversed(large):
        inside = forks[np.searchsorted(forks, begin) : np.searchsorted(forks, stop)].tolist()
        lights = {fork: _together([best[light] for light in hung[fork]]) for fork in inside}
        best[begin] = min(
            _split(begin, stop, lights, end),
            _whole(begin, int(end[begin]), masked=bool(lights)),
            key=lambda found: found.cost,
        )
    return _together([best[begin] for begin in hung[-1]])


def _split(begin: int, stop: int, lights: dict[int, Cuts], end: Ints) -> Cuts:
    """The cheapest cuts of the chain of rows `begin` to `stop`, with those of what hangs off its forks."""
    edges = [begin]
    for corner in (*(fork + 1 for fork in lights), stop):
        base, parts = edges[-1], -(-(corner - edges[-1]) // CHUNK)
        edges += [base + (corner - base) * (part + 1) // parts for part in range(parts)]
    starts, inner = np.array(edges[:-1]), np.array(edges[1:-1], np.int64)  # [R], [R - 1]
    below = end[inner - 1]  # [R - 1] rows from an edge to here are below it
    light = np.array([lights[edge - 1].begin if edge - 1 in lights else 0 for edge in edges[1:-1]], np.int64)
    keys = inner[:, None] - starts  # [R - 1, R] of a cut at the edge, if the last one was before the run
    cut = _triangle(keys) + _rectangle((below - inner)[:, None], keys)
    pass_by = np.where((light > 0)[:, None], _rectangle((below - light)[:, None], keys), 0.0)
    # [i] least cost of the chain from the edge on, if it was cut last before run i
    rest = _triangle(stop - starts)
    cut_is_better = []
    for j in reversed(range(len(inner))):
        cut_here, go_on = cut[j, : j + 1] + rest[j + 1], pass_by[j, : j + 1] + rest[: j + 1]
        cut_is_better.append(cut_here < go_on)
        rest = np.minimum(cut_here, go_on)
    chains, rectangles, start = [], [], 0
    for j, better in enumerate(reversed(cut_is_better)):
        first, edge, last = edges[start], edges[j + 1], int(below[j])
        if better[start]:
            chains.append((first, edge))
            rectangles.append((edge, last, first, edge))
            start = j + 1
        elif light[j]:
            rectangles.append((int(light[j]), last, first, edge))
    chains.append((edges[start], stop))
    return _joined([Cuts(begin, stop, float(rest[0]), tuple(chains), (), tuple(rectangles)), *lights.values()])


def _whole(begin: int, stop: int, *, masked: bool) -> Cuts:
    size, rows = stop - begin, ((begin, stop),)
    if masked:
        return Cuts(begin, stop, _rectangle(size, size), subtrees=rows)
    return Cuts(begin, stop, _triangle(size), chains=rows)


def _together(found: Sequence[Cuts]) -> Cuts:
    """Subtrees next to each other, some of them in one block where that is cheaper."""
    groups = [found[0]]
    for subtree in found[1:]:
        block = _whole(groups[-1].begin, subtree.stop, masked=True)
        if block.cost < groups[-1].cost + subtree.cost:
            groups[-1] = block
        else:
            groups.append(subtree)
    return _joined(groups)


def _joined(found: Sequence[Cuts]) -> Cuts:
    return Cuts(
        found[0].begin,
        max(part.stop for part in found),
        sum(part.cost for part in found),
        *(
            tuple(chain.from_iterable(getattr(part, kind) for part in found))
            for kind in ("chains", "subtrees", "rectangles")
        ),
    )


def _rectangle(queries: Any, keys: Any) -> Any:
    return CALL + QUERY * queries + KEY * keys + queries * keys


def _triangle(rows: Any) -> Any:
    return CALL + (QUERY + KEY) * rows + rows * np.minimum(rows, (rows + TILE) / 2)
