"""The forward passes of the engine: the cache of the slots, the plans that fill and read it, and prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from treepo.engines.local.shared_pages import Reads, power_of_two
from treepo.errors import EngineError
from treepo.models.attention import Plan, plan_for
from treepo.models.causal_lm import hidden, logits

ROUND = 16  # keys are attended to in multiples of this many: aligned masks for CUDA, fewer shapes for CPU kernels
FEW = range(3, 9)  # with so many queries, MKL multiplies keys by queries up to twice as fast as queries by keys
FIRST = 128  # positions of the first allocation: short contexts are allocated once
PREFILL_TOKENS = 8192  # of one pass, unless a single prefix is longer


class Cache:
    """Key-values of all slots in one tensor [layers, 2, slots, K, length, d]; grows by doubling up to its limits.

    New memory is zeroed. Attention gives positions that are not in use the weight 0, and 0 times infinity would be NaN.
    """

    def __init__(self, model: PreTrainedModel, slots: int, length: int) -> None:
        # One token through the model shows what it caches. Configurations have different names for these sizes.
        (probe,) = prefill(model, [[0]])  # [layers, 2, K, 1, d]
        self.token_bytes = probe.nbytes
        self.limits = slots, -(-length // ROUND) * ROUND
        self._kv = probe.new_zeros((*probe.shape[:2], 0, probe.shape[2], 0, probe.shape[4]))

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `length` positions in each of `slots` slots; what is stored stays."""
        old = self._kv
        have = old.shape[2], old.shape[4]
        if slots <= have[0] and length <= have[1]:
            return
        wanted = slots, max(-(-length // ROUND) * ROUND, FIRST)
        # Twice the present size, or the limit at once if twice what is wanted would reach it.
        n, t = (
            had if want <= had else limit if limit <= 2 * want else max(want, 2 * had)
            for want, had, limit in zip(wanted, have, self.limits, strict=True)
        )
        self._kv = old.new_zeros((*old.shape[:2], n, old.shape[3], t, old.shape[5]))
        self._kv[:, :, : have[0], :, : have[1]] = old

    def read(self, slot: int, begin: int, end: int) -> Tensor:
        """A copy [layers, 2, K, end - begin, d] of positions `begin` to `end` of a slot."""
        return self._kv[:, :, slot, :, begin:end].clone()

    def write(self, slot: int, begin: int, block: Tensor) -> None:
        """Put `block` [layers, 2, K, t, d] at position `begin` of a slot."""
        self._kv[:, :, slot, :, begin : begin + block.shape[3]] = block

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        self._kv[:, :, target, :, :length] = self._kv[:, :, source, :, :length]

    def layers(self) -> Tensor:
        """The whole [layers, 2, slots, K, length, d], for plans to write and read."""
        return self._kv


class Decode:
    """One token in each of the first n slots: its key-value joins the slot, and it sees the slot up to itself."""

    def __init__(self, cache: Cache, positions: Tensor, longest: int) -> None:
        """`positions` [n] int64 of the tokens in their slots, of which `longest` is the largest plus 1."""
        kv = cache.layers()
        n, keys = len(positions), min(-(-longest // ROUND) * ROUND, kv.shape[4])
        self._rows, self._positions = torch.arange(n, device=kv.device), positions
        self._kv = kv[:, :, :n]
        self._seen = self._kv[:, :, :, :, :keys]
        future = torch.arange(keys, device=kv.device) > positions[:, None]  # [n, keys]
        self._bias = kv.new_zeros(n, 1, 1, keys).masked_fill_(future[:, None, None], -torch.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [n, H, 1, d], k and v [n, K, 1, d]; returns [n, 1, H, d]."""
        n, heads, _, d = q.shape
        self._write(layer, k, v)
        keys, values = self._seen[layer].unbind()
        # The queries of a group share their key-value head: as rows of one small matrix they read it once.
        grouped = q.reshape(n, k.shape[1], heads // k.shape[1], d)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._bias, scale=scale)
        return out.reshape(n, 1, heads, v.shape[-1])

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        for cached, new in zip(self._kv[layer].unbind(), (k, v), strict=True):
            cached[self._rows, :, self._positions] = new[:, :, 0]


class Shared(Decode):
    """`Decode` for rows that read their first positions in pages and have only their tails in slots.

    Tails and pages are attended to separately, each page by all its readers at once. The parts of a row are merged by
    their log-sum-exps, which is exact.
    """

    def __init__(self, cache: Cache, positions: Tensor, longest: int, reads: Reads) -> None:
        super().__init__(cache, positions - reads.begins, longest)
        self._reads = reads

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [n, H, 1, d], k and v [n, K, 1, d]; returns [n, 1, H, d]."""
        n, heads, _, d = q.shape
        self._write(layer, k, v)
        grouped = q.reshape(n * k.shape[1], -1, d)  # [n * K, H / K, d]
        bias = self._bias.expand(-1, k.shape[1], -1, -1).flatten(0, 1)
        keys, values = self._seen[layer].flatten(1, 2).unbind()  # [n * K, keys, d]
        own, total = _part(grouped, keys, values, scale, bias)
        outs, totals = [torch.zeros_like(own[:1])], [torch.full_like(total[:1], -torch.inf)]  # the empty part
        for pages, readers in self._reads.pools:
            keys, values = pages[layer].flatten(1, 2).unbind()  # [P * K, S, d]
            out, totals_of = _part(grouped.index_select(0, readers).view(len(keys), -1, d), keys, values, scale)
            outs.append(out.view(-1, *own.shape[1:]))
            totals.append(totals_of.view(-1, *total.shape[1:]))
        parts = self._reads.parts
        weights = torch.cat((total[:, None], torch.cat(totals)[parts]), 1).softmax(1)  # [n * K, 1 + most, H / K, 1]
        shared = (weights[:, 1:] * torch.cat(outs)[parts]).sum(1)  # [n * K, H / K, d]
        return (weights[:, 0] * own + shared).to(q.dtype).view(n, 1, heads, d)


def _part(q: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [b, m, d] to `keys` and `values` [b, t, d] alone, and its log-sum-exps [b, m, 1]."""
    if q.shape[1] in FEW:
        scores = torch.bmm(keys, q.transpose(1, 2)).transpose(1, 2).contiguous()
    else:
        scores = torch.bmm(q, keys.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if bias is not None:
        scores += bias
    weights = scores.softmax(-1)
    total = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()  # the largest weight is at least 1 / t
    return torch.bmm(weights.to(values.dtype), values).to(scores.dtype), total


class Steps:
    """Logits [n, V] that follow one token in each of the first n slots of a cache.

    On CUDA a small model spends most of a step on launching kernels. So `graphs` records the kernels once for each pair
    of sizes (rows and keys, both rounded up to a power of two) and replays them on tensors that stay in place. Rows of
    padding use slots that are not in use, so that it does not matter what they compute. A graph holds addresses, so the
    steps are recorded again when the cache has grown.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, plan: type[Decode], *, graphs: bool) -> None:
        self.cache = cache
        self.graphs = graphs
        self._model, self._plan = model, plan
        self._recorded: dict[tuple[int, int], tuple[Tensor, Tensor, Callable[[], None], Tensor]] = {}
        self._layers = cache.layers()
        # One pool for all: logits are read before another graph runs.
        self._pool = torch.cuda.graph_pool_handle() if graphs and model.device.type == "cuda" else None

    def __call__(self, ids: Tensor, positions: Tensor, longest: int, reads: Reads | None = None) -> Tensor:
        """`ids` and `positions` [n] int64 of the tokens; `longest` is the largest place in a slot plus 1.

        Without `reads` that place is the position. Steps with `reads` are not recorded: the pages change too often.
        """
        n = len(ids)
        if not self.graphs or reads is not None:
            self.cache.reserve(n, longest)
            return self._forward(ids, positions, longest, reads)
        rows, keys = min(power_of_two(n), self.cache.limits[0]), power_of_two(max(longest, ROUND))
        self.cache.reserve(rows, longest)
        if self._layers is not self.cache.layers():
            self._recorded, self._layers = {}, self.cache.layers()
        if (rows, keys) not in self._recorded:
            self._recorded[rows, keys] = self._record(F.pad(ids, (0, rows - n)), F.pad(positions, (0, rows - n)), keys)
        static_ids, static_positions, replay, out = self._recorded[rows, keys]
        static_ids[:n], static_positions[:n] = ids, positions
        replay()
        return out[:n]

    def _forward(self, ids: Tensor, positions: Tensor, longest: int, reads: Reads | None = None) -> Tensor:
        if reads is None:
            plan = self._plan(self.cache, positions, longest)
        else:
            plan = Shared(self.cache, positions, longest, reads)
        return logits(self._model, hidden(self._model, ids[:, None], positions[:, None], plan)[:, 0])

    def _record(self, ids: Tensor, positions: Tensor, keys: int) -> tuple[Tensor, Tensor, Callable[[], None], Tensor]:
        """Tensors to fill, a function that then computes, and the logits; without CUDA nothing is recorded."""
        out = self._forward(ids, positions, keys)  # the step itself: done again it writes the same key-values
        if not ids.is_cuda:

            def again() -> None:
                out.copy_(self._forward(ids, positions, keys))

            return ids, positions, again, out
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their workspaces at a first call on a side stream
            self._forward(ids, positions, keys)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = self._forward(ids, positions, keys)
        return ids, positions, graph.replay, out


class Recorded:
    """A plan that also keeps the key-values of every layer."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.kv: list[Tensor] = []  # per layer [2, K, T, d]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.kv.append(torch.cat((k, v)))
        return self._plan.attend(layer, q, k, v, scale)


def prefill(model: PreTrainedModel, prefixes: Sequence[Sequence[int]], most: int = PREFILL_TOKENS) -> Iterator[Tensor]:
    """Key-values [layers, 2, K, t, d] of each of `prefixes` of t tokens, from packed rows of up to `most` of them."""
    begin = 0
    while begin < len(prefixes):
        end, tokens = begin + 1, len(prefixes[begin])
        while end < len(prefixes) and tokens + len(prefixes[end]) <= most:
            end, tokens = end + 1, tokens + len(prefixes[end])
        yield from _packed_pass(model, prefixes[begin:end])
        begin = end


def _packed_pass(model: PreTrainedModel, prefixes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    lengths = np.array([len(prefix) for prefix in prefixes])
    ends = lengths.cumsum()
    row = np.arange(ends[-1])
    position = row - np.repeat(ends - lengths, lengths)
    plan = Recorded(plan_for(np.where(position > 0, row - 1, -1), np.repeat(ends, lengths), device=model.device))
    ids = torch.tensor([token for prefix in prefixes for token in prefix], device=model.device)
    hidden(model, ids[None], torch.as_tensor(position, device=model.device)[None], plan)
    return torch.split(torch.stack(plan.kv), lengths.tolist(), dim=3)


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients and no dropout inside; afterwards the modules are in the mode that they were in before."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def out_of_memory(slots: int) -> Iterator[None]:
    """Turn an error for lack of memory into an `EngineError`; any other error passes."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise EngineError(
            f"out of memory while decoding {slots} slots: lower engine.slots, engine.max_tokens or the response "
            f"budget, or set engine.memory_gib ({str(error).splitlines()[0]})"
        ) from error
