"""Attention over trees: the seam through which unmodified Hugging Face models meet a plan.

A model prepared by `install` asks the *plan* of its current forward pass for every attention: `plan.attend(...)`.
The packed update and the embedded engine are plans; both run on the model's own weights and layers.

A packed row (`treepo.packing`) has one rule, `visible`, and two plans: `Dense`, which is the rule written out for all
pairs, and `Chains`, which computes the same without most of the pairs that see nothing of each other.

Letters: B rows, T tokens of a row, H query heads, K key-value heads, d dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from treepo.errors import ConfigError, nearest
from treepo.packing import PackedBatch

NAME = "treepo"

PlanName = Literal["auto", "chains", "dense"]

Ints = NDArray[np.int64]
Array = TypeVar("Array", Tensor, NDArray[Any])

# Costs for `Chains` in (query, key) pairs, measured forward and backward on one x86 core at H x d of 64 and 256 (35 to
# 100 ns a pair). They decide how chains share calls, never what is computed; four times more or less costs under 10 %.
CALL = 4096  # an attention call, however small
ROW = 8  # a query or key of padding, beside its pairs


class Plan(Protocol):
    """How the queries of one forward pass see the keys."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, H, T, d], k and v [B, K, T, d] with H a multiple of K; returns [B, T, H, d]."""
        ...


class Causal:
    """Plain causal rows without padding: the plan that every other one is compared with."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def visible(q: Array, kv: Array, end: Array) -> Array:
    """Whether query row `q` sees key row `kv`, where `end` is `PackedBatch.end` at `kv`; arrays broadcast.

    A token's subtree is the rows from itself to `end`, so this is: the query is in the key's subtree. It holds inside
    a segment, for ancestors, between siblings and between trees.
    """
    return (kv <= q) & (q < end)


class Dense:
    """`visible` for all T x T pairs. The reference; time and memory go with T squared."""

    def __init__(self, end: Tensor) -> None:
        rows = torch.arange(len(end), device=end.device)
        self.mask = visible(rows[:, None], rows[None, :], end[None, :])  # [T, T] bool

    def __str__(self) -> str:
        return "dense"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _masked(q, k, v, self.mask, scale).transpose(1, 2)


class Chains:
    """Exact attention of a packed row in few dense calls.

    A *chain* is a longest run of rows in which each token is predicted by the row before it: from a tree's root, or
    from a child that is not its parent's first, down the first children. A chain attends to its ancestors, which are
    a few contiguous runs of earlier chains, and causally to itself: it is a block of queries [first, first + length)
    with keys [ancestors, own rows]. Chains of similar shape share a call, padded to the largest; a padded key is seen
    by no query, and the output of a padded query is dropped. How many calls there are is the cheapest division of the
    chains in order of size (`CALL`, `ROW`). A tree's first chain has no ancestors and needs no mask.

    Everything is public scaled_dot_product_attention and automatic differentiation, so gradients are exact; masks and
    indices are made once per forward pass and shared by its layers. Memory: there are as many chains as leaves, and
    each has its own copy of its ancestors' keys and values (of nothing else); masks have one number per pair.
    """

    def __init__(self, batch: PackedBatch, device: torch.device) -> None:
        self.calls = [_Call.of(group, batch.end, device) for group in _grouped(_chains(batch))]
        tokens = len(batch)
        queries = [call.queries for call in self.calls]
        keys = [call.keys for call in self.calls]
        self._from_queries = _Take.plan(queries, tokens, device)
        self._from_keys = _Take.plan(keys, tokens, device)
        # The slot of each row's output among the (padded) queries of all calls, and that map's own inverse.
        slot = np.empty(tokens, np.int64)
        flat = np.concatenate([q.ravel() for q in queries])
        slot[flat[flat < tokens]] = np.flatnonzero(flat < tokens)
        self._to_rows = _Take.plan([slot], len(flat), device)
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
            take(x.transpose(1, 2).reshape(tokens, -1))
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
            out = _masked(qs, ks, vs, mask, scale)
            outputs.append(out.transpose(1, 2).reshape(-1, heads * width))
        return self._to_rows(torch.cat(outputs)).view(1, tokens, heads, width)


def plan_for(batch: PackedBatch, name: PlanName = "auto", device: torch.device | str = "cpu") -> Plan:
    """The plan called `name` for a packed row; every name gives the same attention up to rounding.

    `dense` is the reference, `chains` the fast one, `auto` the fastest known: `chains`. One call with a dense mask
    per tree, batched over the trees, took 1.05 (star of 160 tokens) to 8 times as long from segments of 4 tokens on;
    serving small subtrees whole gained nothing beyond noise.
    """
    if name not in get_args(PlanName):
        raise ConfigError(
            f"attention plan {name!r} is not one of {', '.join(get_args(PlanName))}{nearest(name, get_args(PlanName))}"
        )
    if not len(batch):
        raise ValueError("a packed row needs at least one token")
    device = torch.device(device)
    if name == "dense":
        return Dense(torch.as_tensor(batch.end, device=device))
    return Chains(batch, device)


def install(model: PreTrainedModel) -> None:
    """Route the attention of every layer of `model` through the plan of the forward pass (in place)."""
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    plan: Plan | None = options.get("plan")
    if plan is None:
        raise ValueError("this model runs under a treepo plan: call it through treepo.model, or set another attention")
    # What a plan cannot express must never be dropped silently.
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name!r} is not supported")
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    return plan.attend(module.layer_idx, q, k, v, scale), None  # type: ignore[arg-type]


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention [n, H, queries, d] under `mask` (True or 0: seen), causal without one."""
    if mask is not None and q.device.type != "cpu":
        # The memory-efficient kernel, the only fast one with a mask there, wants as many key heads as query heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@dataclass(frozen=True)
class _Chain:
    """Rows `first` to `first + length` and the rows that all of them see outside the chain."""

    first: int
    length: int
    ancestors: Ints  # ascending

    @property
    def keys(self) -> int:
        return len(self.ancestors) + self.length


def _chains(batch: PackedBatch) -> list[_Chain]:
    """The chains of a row in its order, a parent before its children."""
    first = np.flatnonzero((batch.prev != np.arange(len(batch)) - 1) | (batch.prev < 0))
    fork = batch.prev[first]  # the row that a chain hangs off, -1 for a tree's first chain
    parent = np.searchsorted(first, fork, side="right") - 1
    chains: list[_Chain] = []
    for begin, length, p, end in zip(
        first.tolist(), np.diff(first, append=len(batch)).tolist(), parent, fork, strict=True
    ):
        ancestors = np.empty(0, np.int64)
        if end >= 0:
            ancestors = np.concatenate([chains[p].ancestors, np.arange(chains[p].first, end + 1)])
        chains.append(_Chain(begin, length, ancestors))
    return chains


def _grouped(chains: Sequence[_Chain]) -> list[list[_Chain]]:
    """Divide the chains into calls, those without ancestors apart from the others."""
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
    """n chains padded to one shape. Rows of padding have the index T."""

    queries: Ints  # [n, most queries]
    keys: Ints  # [n, most keys]
    visible: Tensor | None  # [n, 1, most queries, most keys] bool, None: plainly causal

    @classmethod
    def of(cls, chains: Sequence[_Chain], end: Ints, device: torch.device) -> _Call:
        """The call for `chains`, which all have ancestors or all have none; `end` is that of their row."""
        tokens = len(end)
        queries = np.full((len(chains), max(chain.length for chain in chains)), tokens)
        keys = np.full((len(chains), max(chain.keys for chain in chains)), tokens)
        for i, chain in enumerate(chains):
            own = np.arange(chain.first, chain.first + chain.length)
            queries[i, : chain.length] = own
            keys[i, : chain.keys] = np.concatenate([chain.ancestors, own])
        if not len(chains[0].ancestors):
            return cls(queries, keys, None)
        q, kv = (torch.as_tensor(x, device=device) for x in (queries, keys))
        ends = torch.as_tensor(np.append(end, 0), device=device)[kv]
        seen = visible(q[:, None, :, None], kv[:, None, None, :], ends[:, None, None, :])
        # A query of padding would see nothing and divide by zero; its output is dropped, so let it see anything.
        seen |= (q == tokens)[:, None, :, None]
        return cls(queries, keys, seen)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores: attention would make it from the boolean mask at every layer anew."""
        if self.visible is None:
            return None
        return torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device).masked_fill_(
            ~self.visible, -torch.inf
        )


class _Take(torch.autograd.Function):
    """x [rows, width] -> x[index] [slots, width], with a backward that sums the slots of each row in a fixed order.

    `index_select` alone would do; its backward adds slot by slot and is twice as slow on a CPU.
    """

    @staticmethod
    def plan(index: Sequence[Ints], rows: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function of x for `index` (joined); slots of padding (index = rows) take row 0 and give no gradient."""
        flat = np.concatenate([i.ravel() for i in index])
        used = np.flatnonzero(flat < rows)
        slots = used[np.argsort(flat[used], kind="stable")]  # sorted by row
        offsets = np.searchsorted(flat[slots], np.arange(rows))
        tensors = [torch.as_tensor(x, device=device) for x in (np.where(flat < rows, flat, 0), slots, offsets)]
        apply: Callable[..., Tensor] = _Take.apply
        return lambda x: apply(x, *tensors)

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(slots, offsets)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        slots, offsets = ctx.saved_tensors
        return F.embedding_bag(slots, grads[0].contiguous(), offsets, mode="sum"), None, None, None
