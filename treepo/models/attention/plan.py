"""What a plan is, the rule of a packed row, and the two plans that write their rule out in full.

Letters: B rows, T tokens (attention queries) of a row, P keys before it (its past), H query heads, K key-value heads,
d dimensions of a head.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Array = TypeVar("Array", Tensor, NDArray[Any])


class Plan(Protocol):
    """How the queries of one forward pass see the keys."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, H, T, d], k and v [B, K, P + T, d] with H a multiple of K; returns [B, T, H, d]."""
        ...


class Causal:
    """Plain causal rows without padding or past, as any model attends."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def visible(q: Array, kv: Array, end: Array) -> Array:
    """Whether query row `q` sees key row `kv`, where `end` is `PackedBatch.end` at `kv`; arrays broadcast.

    A token's subtree is the rows from itself to `end`. So the rule is: a query sees a key if it is in the key's
    subtree. This one rule is right inside a segment, for ancestors, between siblings and between trees.
    """
    return (kv <= q) & (q < end)


def chain_starts(prev: Ints) -> Ints:
    """The first row of each chain [C], ascending, of the row that has this `PackedBatch.prev` [T].

    A *chain* is a longest run of rows in which each row predicts the next one. A chain starts at the root of a tree,
    or at a child that is not the first child of its parent. It goes down the first children to a leaf. So the chains
    divide the row, and there is about one per leaf.
    """
    starts: Ints = np.flatnonzero((prev != np.arange(len(prev)) - 1) | (prev < 0))
    return starts


def with_past(end: Ints, past: int) -> Ints:
    """`end` [P + T] of a row and the `past` keys before it. Every row is in the subtree of these keys."""
    return np.concatenate([np.full(past, past + len(end), np.int64), past + end])


class Dense:
    """The reference: `visible` for all T x (P + T) pairs. Time and memory grow with T squared."""

    def __init__(self, end: Ints, past: int, device: torch.device) -> None:
        keys = torch.arange(past + len(end), device=device)
        ends = torch.as_tensor(with_past(end, past), device=device)
        self.mask = visible(keys[past:, None], keys[None, :], ends[None, :])  # [T, P + T] bool

    def __str__(self) -> str:
        return "reference"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return masked(q, k, v, self.mask, scale).transpose(1, 2)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention [n, H, queries, d] under `mask`, boolean (True: seen) or to be added to the scores; None: causal."""
    if mask is not None and q.device.type != "cpu":
        # There only the memory-efficient kernel is fast with a mask. It needs as many key heads as query heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
