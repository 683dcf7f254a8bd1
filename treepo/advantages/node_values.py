"""Values of nodes [N], computed from one number per leaf [L], and differences of values along a path."""

from __future__ import annotations

import numpy as np

from treepo.forest import Floats, Forest, Ints


def mean_over_leaves(forest: Forest, value: Floats) -> Floats:
    """[N] the mean of `value` [L] over the leaves at or below each node, with equal weights; 0 without such a leaf."""
    total = forest.over_leaves(np.broadcast_to(value[:, None], forest.path.shape))
    return total / np.maximum(forest.leaf_count, 1.0)


def mean_over_children(forest: Forest, value: Floats) -> Floats:
    """[N] `value` [L] at the leaves; at other nodes the mean over the children, with equal weights; 0 without a leaf.

    It differs from `mean_over_leaves` if the children have different numbers of leaves.
    """
    path = forest.path
    # A leaf's weight in a node is the product of 1 / children over the path from the node to the leaf.
    share = np.where(path >= 0, 1.0 / np.maximum(children(forest), 1)[path], 1.0)
    share = np.cumprod(share[:, ::-1], axis=1)[:, ::-1]
    return forest.over_leaves(value[:, None] * share)


def children(forest: Forest) -> Floats:
    """[N] the number of children of each node that have a leaf with a known reward at or below them."""
    has_leaves = (forest.leaf_count > 0) & (forest.parent >= 0)
    return np.bincount(forest.parent[has_leaves], minlength=len(forest.length)).astype(np.float64)


def at_parent(forest: Forest, value: Floats) -> Floats:
    """[N] `value` [N] of each node's parent; for a root, its value."""
    return value[np.where(forest.parent >= 0, forest.parent, np.arange(len(value)))]


def spread_of_children(forest: Forest, value: Floats) -> Floats:
    """[N] the (biased) standard deviation of `value` [N] over each node's children; 0 without children."""
    count = np.maximum(children(forest), 1)
    child = np.flatnonzero((forest.leaf_count > 0) & (forest.parent >= 0))
    parent = forest.parent[child]
    mean = np.bincount(parent, value[child], len(value)) / count
    total = np.bincount(parent, (value[child] - mean[parent]) ** 2, len(value))
    spread: Floats = np.sqrt(total / count)
    return spread


def first_column(forest: Forest) -> Ints:
    """[L, D + 1] the column of `Forest.path` at which the segment of each node begins.

    This is the node's column. Only for the lower part of a split segment it is the column of the upper part, if both
    parts lead to the same scored leaves (`Forest.same_segment`).
    """
    column = np.arange(forest.path.shape[1])
    return np.maximum.accumulate(np.where(forest.same_segment[forest.path], 0, column), axis=1)


def over_parent(forest: Forest, value: Floats) -> tuple[Floats, Floats]:
    """`value` [N] of the segment of each node on a path, and of the segment before it, both [L, D + 1].

    Both parts of a split segment have the value and the parent of the upper part. Column 0 is its own parent.
    """
    first = first_column(forest)
    own = np.take_along_axis(value[forest.path], first, axis=1)
    return own, np.take_along_axis(own, np.maximum(first - 1, 0), axis=1)
