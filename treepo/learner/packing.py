"""Packing: many trees as one row of tokens, each token once, with what the loss needs to know about each token.

Letters: T tokens of a row, n nodes of a row, N nodes of a forest, L leaves, D most nodes on a path below the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from treepo.forest import Floats, Forest, Ints
from treepo.tree import ROOT, Tree

Singles = NDArray[np.float32]

SharedTokens = Literal["sum", "mean", "sqrt"]
"""What a token weighs in the loss that k trained leaves share: k (sum), 1 (mean) or the root of k (sqrt)."""


@dataclass(frozen=True)
class Folded:
    """Advantages per (leaf, node), summed per node. A clipped loss needs no more than this.

    A shared token enters the loss once for each leaf below it, with that leaf's advantage A but one ratio r. The sum
    of min(rA, clip(r)A) over the leaves is A+ min(r, 1 + high) + A- max(r, 1 - low), where A+ and A- are the sums of
    the positive and of the negative advantages. Their total alone would not be enough.
    """

    adv_pos: Floats  # [N] >= 0; 0 for roots
    adv_neg: Floats  # [N] <= 0; 0 for roots
    weight: Floats  # [N] what one of its tokens weighs: with `sum`, the number of trained leaves at or below the node
    per_leaf: Floats  # [L, D + 1] before the sums: advantage times weight of each (leaf, node)
    shared_tokens: SharedTokens


@dataclass(frozen=True)
class PackedLeaves:
    """The leaves of a packed row, for losses that look at whole responses."""

    path: Ints  # [L, D + 1] packed nodes, numbered as in `PackedBatch.node`, from the root to the leaf, then -1
    advantage: Singles  # [L, D + 1] `Folded.per_leaf`; 0 for the root


@dataclass(frozen=True)
class PackedBatch:
    """A row of T tokens: whole trees one after the other, each in depth-first order, the deepest child first.

    So a node and its first child, its first grandchild and so on are contiguous in the row, and so is every subtree.
    `end` alone says which token sees which (`treepo.models.attention.visible`).
    """

    token_ids: Ints  # [T]
    position: Ints  # [T] tokens between the start of the tree and this one on its path
    prev: Ints  # [T] row index of the token that predicts this one; -1 for the first of a tree
    end: Ints  # [T] row index just past the subtree of the token's node
    rollout_logprob: Singles  # [T] of the distribution sampled from, in nats; 0 where nothing was sampled
    adv_pos: Singles  # [T] `Folded.adv_pos` of the token's node; 0 where nothing was sampled
    adv_neg: Singles  # [T]
    weight: Singles  # [T] `Folded.weight`; 0 where nothing was sampled, so that it is not trained on
    node: Ints  # [T] the packed node, 0 to n - 1, that the token belongs to
    leaves: PackedLeaves
    shared_tokens: SharedTokens  # how `weight`, `adv_pos` and `adv_neg` count a token that several leaves share

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a loss is a mean over: the whole batch of an optimizer step, with all its rows in all processes."""

    weight: float  # sum of `PackedBatch.weight`: with `sum`, the number of (leaf, sampled token) pairs
    leaves: int  # number of trained leaves

    @classmethod
    def of(cls, rows: Sequence[PackedBatch]) -> Self:
        """The totals of a batch that consists of `rows`."""
        return cls(sum(float(row.weight.sum()) for row in rows), sum(len(row.leaves.path) for row in rows))


def pack(
    forest: Forest,
    advantage: Floats,
    *,
    shared_tokens: SharedTokens = "sum",
    max_tokens: int = 16384,
    trees: Sequence[int] | None = None,
) -> list[PackedBatch]:
    """Rows of at most `max_tokens` tokens that hold every trained token of `forest` once.

    `advantage` [L, D + 1] is what an estimator returns for `forest`. `shared_tokens` must be that of the loss.
    `trees`: indices of the trees to pack; default: all. A tree of more than `max_tokens` tokens gets a row of its own,
    which `accumulate` computes in pieces. Trees without a leaf of known reward are left out. If all are left out, there
    is no row at all.

    Raises `ValueError` for advantages of another shape or that are not finite, an unknown `shared_tokens`, an index
    that no tree has, and `max_tokens` below 1.
    """
    folded = fold(forest, advantage, shared_tokens)
    which = range(len(forest.trees)) if trees is None else trees
    if unknown := [t for t in which if not 0 <= t < len(forest.trees)]:
        raise ValueError(f"tree {unknown[0]} is not one of the forest's, which are 0 to {len(forest.trees) - 1}")
    return pack_rows(forest, folded, which, max_tokens)


def pack_rows(forest: Forest, folded: Folded, which: Sequence[int], max_tokens: int) -> list[PackedBatch]:
    """As `pack`, for the trees `which` of a forest that is folded already, such as one that makes several batches."""
    return [pack_row(forest, folded, row) for row in bins(forest, folded, which, max_tokens)]


def fold(forest: Forest, advantage: Floats, shared_tokens: SharedTokens = "sum") -> Folded:
    """Sum `advantage` over the leaves below each node, the positive and the negative ones separately.

    `advantage` [L, D + 1] has the shape of `forest.path`: one number per leaf and node on its path. Column 0 (prompts)
    and entries after a path's end are ignored.

    With `sum` every leaf counts on every one of its tokens, as if it were a row of its own (TreePO, Tree-GRPO). `mean`
    divides the sums by the number k of leaves, so that a shared token counts once (SPO). `sqrt` divides them by the
    root of k (TreeRL, AttnRL). In other words, a (leaf, token) pair has the weight 1, 1 / k or 1 / sqrt(k).
    """
    advantage = np.asarray(advantage, np.float64)
    if advantage.shape != forest.path.shape:
        raise ValueError(
            f"advantages of shape {advantage.shape} for paths of shape {forest.path.shape}: there is one row per leaf "
            "with a known reward, and one column per node on its path, the prompt first (forest.path)"
        )
    if shared_tokens not in get_args(SharedTokens):
        raise ValueError(f"shared_tokens is {shared_tokens!r}: it must be one of {', '.join(get_args(SharedTokens))}")
    power = {"sum": 0.0, "sqrt": -0.5, "mean": -1.0}[shared_tokens]
    share = np.maximum(forest.leaf_count, 1.0) ** power  # [N] weight of a (leaf, token) pair
    per_leaf = np.where(forest.path >= 0, advantage * share[forest.path], 0.0)
    per_leaf[:, :1] = 0.0
    if not np.isfinite(per_leaf).all():
        raise ValueError("advantages that are not finite")
    return Folded(
        adv_pos=forest.over_leaves(np.maximum(per_leaf, 0.0)),
        adv_neg=forest.over_leaves(np.minimum(per_leaf, 0.0)),
        weight=forest.leaf_count * share,
        per_leaf=per_leaf,
        shared_tokens=shared_tokens,
    )


def pack_row(forest: Forest, folded: Folded, which: Sequence[int]) -> PackedBatch:
    """One row of the trees `forest.trees[t]` for t in `which`, in that order.

    Nodes without a trained leaf below are left out, and so are trees without a trained leaf.
    """
    node: list[int] = []  # [n] forest index of each packed node
    tokens: list[list[int]] = []  # [n] what it adds
    logprobs: list[list[float]] = []
    position: list[int] = []  # [n] of its first token
    prev: list[int] = []  # [n] row of the token that predicts its first one
    end: list[int] = []  # [n]
    row = 0
    for t in which:
        tree, first = forest.trees[t].tree, int(forest.first_node[t])
        order = _depth_first(tree, _trained(forest, folded, t))
        size = _subtree_tokens(tree, order)
        last = {-1: -1}  # tree node -> row of its last token
        for n in order:
            here = tree.nodes[n]
            node.append(first + n)
            tokens.append(here.tokens)
            logprobs.append(here.logprobs if here.sampled and n != ROOT else [0.0] * len(here.tokens))
            position.append(here.start)
            prev.append(last[here.parent])
            end.append(row + size[n])
            row += len(here.tokens)
            last[n] = row - 1

    nodes = np.array(node, np.int64)
    length = np.array([len(t) for t in tokens], np.int64)
    first_row = np.cumsum(length) - length
    rows = np.arange(row)
    predicted_by = rows - 1
    has = length > 0  # a failed leaf may add nothing
    predicted_by[first_row[has]] = np.array(prev, np.int64)[has]
    of = np.repeat(nodes, length)  # [T]
    sampled = forest.length[of] > 0  # [T]
    adv_pos, adv_neg, weight = (
        np.where(sampled, x[of], 0.0).astype(np.float32) for x in (folded.adv_pos, folded.adv_neg, folded.weight)
    )
    return PackedBatch(
        token_ids=np.fromiter(chain.from_iterable(tokens), np.int64, row),
        position=np.repeat(np.array(position, np.int64) - first_row, length) + rows,
        prev=predicted_by,
        end=np.repeat(np.array(end, np.int64), length),
        rollout_logprob=np.fromiter(chain.from_iterable(logprobs), np.float32, row),
        adv_pos=adv_pos,
        adv_neg=adv_neg,
        weight=weight,
        node=np.repeat(np.arange(len(nodes)), length),
        leaves=_leaves(forest, folded, which, nodes),
        shared_tokens=folded.shared_tokens,
    )


def _leaves(forest: Forest, folded: Folded, which: Sequence[int], nodes: Ints) -> PackedLeaves:
    """The leaves of the trees `which`, whose packed nodes have the forest indices `nodes` [n]."""
    # Leaves are in the order of their trees. So a row looks at its own trees only, however large the forest is.
    trees = np.sort(np.asarray(list(which), np.int64))
    ends = zip(*(np.searchsorted(forest.tree, trees, side).tolist() for side in ("left", "right")), strict=True)
    here = np.array([leaf for first, end in ends for leaf in range(first, end)], np.int64)
    path = forest.path[here]
    packed, on_path, order = np.full(path.shape, -1, np.int64), path >= 0, np.argsort(nodes)
    packed[on_path] = order[np.searchsorted(nodes, path[on_path], sorter=order)]
    return PackedLeaves(packed, folded.per_leaf[here].astype(np.float32))


def bins(forest: Forest, folded: Folded, which: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Distribute the trees `which` over rows of at most `max_tokens` packed tokens, by first-fit decreasing.

    The same trees give the same rows. Trees without a trained leaf are in no row. A tree that alone has more than
    `max_tokens` tokens gets a row of its own.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    size = {t: _packed_tokens(forest.trees[t].tree, _trained(forest, folded, t)) for t in which}
    rows: list[list[int]] = []
    room: list[int] = []
    for t in sorted((t for t in size if size[t]), key=lambda t: (-size[t], t)):
        row = next((r for r, free in enumerate(room) if size[t] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(t)
        room[row] -= size[t]
    return rows


def _trained(forest: Forest, folded: Folded, t: int) -> NDArray[np.bool_]:
    """[nodes of tree t] whether a trained leaf is at or below the node."""
    return folded.weight[forest.first_node[t] : forest.first_node[t + 1]] > 0


def _packed_tokens(tree: Tree, kept: NDArray[np.bool_]) -> int:
    return sum(len(node.tokens) for node, keep in zip(tree.nodes, kept, strict=True) if keep)


def _depth_first(tree: Tree, kept: NDArray[np.bool_]) -> list[int]:
    """The kept nodes, parents first. Of several children the one with the longest path (in tokens) is first."""
    downward = [ROOT] if kept[ROOT] else []
    for n in downward:
        downward.extend(child for child in tree.children[n] if kept[child])
    reach = [0] * len(tree)  # tokens from the start of a node to the end of its longest path
    for n in reversed(downward):
        reach[n] = len(tree.nodes[n].tokens) + max((reach[child] for child in tree.children[n]), default=0)
    order, todo = [], downward[:1]
    while todo:
        order.append(n := todo.pop())
        children = [child for child in tree.children[n] if kept[child]]
        todo.extend(sorted(children, key=lambda child: (reach[child], -child)))
    return order


def _subtree_tokens(tree: Tree, order: list[int]) -> dict[int, int]:
    """Packed tokens of each node's subtree, its own included."""
    size = {n: len(tree.nodes[n].tokens) for n in order}
    for n in reversed(order[1:]):
        size[tree.nodes[n].parent] += size[n]
    return size
