"""The portable fast plan: the chains of a packed row, those of similar shape in one call. Public PyTorch alone.

Letters: T tokens of a row, P keys before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treepo.models.attention.plan import Ints, chain_starts, masked, visible, with_past

# Costs for `Chains` in (query, key) pairs, measured forward and backward on one x86 core at H x d of 64 and 256 (35 to
# 100 ns a pair). They decide how chains share calls. They never change the result. Values four times larger or smaller
# cost under 10 % of speed.
CALL = 4096  # an attention call, however small
ROW = 8  # a query or key of padding, beside its pairs
QUERY, KEY = 77, 30  # of a whole plan, without padding: a query, and a key of a chain (copied, and its gradient added)


class Chains:
    """Exact attention of a packed row in few dense calls.

    A *chain* (`chain_starts`) attends causally to itself, and to all of its ancestors: a few contiguous runs of earlier
    chains. So a chain is a block of queries [first, first + length) with keys [ancestors, own rows]. Chains of similar
    shape share a call and are padded to the largest of them. No query sees a padded key. The output of a padded query
    is dropped. The chains are sorted by size and divided into calls in the cheapest way (`CALL`, `ROW`). A tree's first
    chain has no ancestors and needs no mask.

    Everything is public scaled_dot_product_attention and automatic differentiation, so gradients are exact. Masks and
    indices are made once per forward pass, and its layers share them. Memory: there is about one chain per leaf. Each
    has its own copy of its ancestors' keys and values, and of nothing else. A mask has one number per pair.
    """

    def __init__(self, prev: Ints, end: Ints, past: int, device: torch.device) -> None:
        self.calls = [_Call.of(group, end, past, device) for group in _grouped(chains_of(prev, past))]
        tokens = len(prev)
        queries = [call.queries for call in self.calls]
        keys = [call.keys for call in self.calls]
        self._from_queries = Take.plan(queries, tokens, device)
        self._from_keys = Take.plan(keys, past + tokens, device)
        # Where each row's output is among the (padded) queries of all calls.
        slot = np.empty(tokens, np.int64)
        flat = np.concatenate([q.ravel() for q in queries])
        slot[flat[flat < tokens]] = np.flatnonzero(flat < tokens)
        self._to_rows = Take.plan([slot], len(flat), device)
        self._masks: list[Tensor | None] | None = None

    def __str__(self) -> str:
        return f"{sum(len(call.queries) for call in self.calls)} chains in {len(self.calls)} calls"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, width = q.shape
        if batch != 1:
            raise ValueError(f"a packed pass has one row, not {batch}")
        if self._masks is None:
            self._masks = [call.mask(q.dtype) for call in self.calls]
        q_all, k_all, v_all = (
            take(x[0].transpose(0, 1).flatten(1))
            for x, take in ((q, self._from_queries), (k, self._from_keys), (v, self._from_keys))
        )
        q_sizes = [call.queries.size for call in self.calls]
        k_sizes = [call.keys.size for call in self.calls]
        outputs = []
        for call, mask, q_part, k_part, v_part in zip(
            self.calls,
            self._masks,
            torch.split(q_all, q_sizes),
            torch.split(k_all, k_sizes),
            torch.split(v_all, k_sizes),
            strict=True,
        ):
            qs, ks, vs = (
                x.view(len(call.queries), -1, x.shape[1] // width, width).transpose(1, 2)
                for x in (q_part, k_part, v_part)
            )
            out = masked(qs, ks, vs, mask, scale)
            outputs.append(out.transpose(1, 2).reshape(-1, heads * width))
        return self._to_rows(torch.cat(outputs)).view(1, tokens, heads, width)


@dataclass(frozen=True)
class Chain:
    """Rows `first` to `first + length` and the keys that all of them see outside the chain."""

    first: int
    length: int
    ancestors: Ints  # ascending; key j < P is of the past, P + i that of row i

    @property
    def keys(self) -> int:
        return len(self.ancestors) + self.length


def chains_of(prev: Ints, past: int) -> list[Chain]:
    """The chains of a row in its order, a parent before its children."""
    first = chain_starts(prev)
    fork = prev[first]  # the row that a chain hangs off, -1 for a tree's first chain
    parent = np.searchsorted(first, fork, side="right") - 1
    chains: list[Chain] = []
    for begin, length, p, end in zip(
        first.tolist(), np.diff(first, append=len(prev)).tolist(), parent, fork, strict=True
    ):
        ancestors = np.arange(past)
        if end >= 0:
            ancestors = np.concatenate([chains[p].ancestors, np.arange(chains[p].first, end + 1) + past])
        chains.append(Chain(begin, length, ancestors))
    return chains


def cost(prev: Ints, end: Ints, past: int) -> float:
    """About what `Chains` costs for a row, in (query, key) pairs: comparable with `Tiling.cost`."""
    first = chain_starts(prev)
    stop = np.append(first[1:], len(prev))
    # The last row of a chain sees all rows up to itself, except those whose subtree has ended before.
    keys = past + stop - np.searchsorted(np.sort(end), stop - 1, side="right")
    return float(((stop - first) * (QUERY + keys) + KEY * keys).sum())


def _grouped(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Divide the chains into calls. A call has chains with ancestors or chains without, never both."""
    groups = []
    for plain in (True, False):
        part = [chain for chain in chains if (len(chain.ancestors) == 0) == plain]
        part.sort(key=lambda chain: (chain.keys, chain.length, chain.first))
        queries = np.array([chain.length for chain in part], np.int64)
        keys = np.array([chain.keys for chain in part], np.int64)
        best = np.zeros(len(part) + 1, np.int64)  # [j] least cost of the first j chains
        begin = np.zeros(len(part) + 1, np.int64)  # [j] where the last call of that division begins
        for j in range(1, len(part) + 1):
            longest = np.maximum.accumulate(queries[:j][::-1])[::-1]  # [i] of chains i to j - 1
            shape = longest * keys[j - 1] + ROW * (longest + keys[j - 1])
            cost = best[:j] + CALL + np.arange(j, 0, -1) * shape
            begin[j] = cost.argmin()
            best[j] = cost[begin[j]]
        j = len(part)
        while j:
            groups.append(part[begin[j] : j])
            j = int(begin[j])
    return groups


@dataclass(frozen=True)
class _Call:
    """n chains padded to one shape."""

    queries: Ints  # [n, most queries] rows; T: padding
    keys: Ints  # [n, most keys] in the order of `Chain.ancestors`; P + T: padding
    visible: Tensor | None  # [n, 1, most queries, most keys] bool, None: plainly causal

    @classmethod
    def of(cls, chains: Sequence[Chain], end: Ints, past: int, device: torch.device) -> _Call:
        """The call for `chains`. All of them have ancestors, or none has. `end` is that of their row."""
        tokens = len(end)
        queries = np.full((len(chains), max(chain.length for chain in chains)), tokens)
        keys = np.full((len(chains), max(chain.keys for chain in chains)), past + tokens)
        for i, chain in enumerate(chains):
            own = np.arange(chain.first, chain.first + chain.length)
            queries[i, : chain.length] = own
            keys[i, : chain.keys] = np.concatenate([chain.ancestors, past + own])
        if not len(chains[0].ancestors):
            return cls(queries, keys, None)
        q, kv = (torch.as_tensor(x, device=device) for x in (queries, keys))
        ends = torch.as_tensor(np.append(with_past(end, past), 0), device=device)[kv]
        seen = visible(past + q[:, None, :, None], kv[:, None, None, :], ends[:, None, None, :])
        # A query of padding would see no key and give NaN. Its output is dropped, so it may see every key.
        seen |= (q == tokens)[:, None, :, None]
        return cls(queries, keys, seen)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores; None: causal. From a boolean mask, every layer would make it anew."""
        if self.visible is None:
            return None
        return torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device).masked_fill_(
            ~self.visible, -torch.inf
        )


class Take(torch.autograd.Function):
    """x [rows, width] -> x[index] [slots, width]. Its backward pass sums the slots of each row in a fixed order.

    `index_select` alone would be correct too. Its backward pass adds slot by slot and is twice as slow on a CPU.
    """

    @staticmethod
    def plan(index: Sequence[Ints], rows: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The function of x for `index` (joined). A slot of padding (index = rows) takes row 0 without gradient."""
        flat = np.concatenate([i.ravel() for i in index])
        used = np.flatnonzero(flat < rows)
        slots = used[np.argsort(flat[used], kind="stable")]  # sorted by row
        offsets = np.searchsorted(flat[slots], np.arange(rows))
        tensors = [torch.as_tensor(x, device=device) for x in (np.where(flat < rows, flat, 0), slots, offsets)]
        apply: Callable[..., Tensor] = Take.apply
        return lambda x: apply(x, *tensors)

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(slots, offsets)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        slots, offsets = ctx.saved_tensors
        return F.embedding_bag(slots, grads[0].contiguous(), offsets, mode="sum"), None, None, None
