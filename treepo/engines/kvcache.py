"""Key-values while decoding: rows of slots, and the two plans that fill and read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from treepo.attention import Causal
from treepo.model import hidden

ROUND = 16  # keys are attended to in multiples of this many: aligned masks for CUDA, fewer shapes for CPU kernels
FIRST = 128  # positions of the first allocation: short contexts are allocated once


class Cache:
    """Key-values of all slots in one tensor [layers, 2, slots, K, length, d]; grows by doubling up to its limits.

    Zeroed when made: attention gives stale positions the weight 0, and only a finite number times 0 is 0.
    """

    def __init__(self, model: PreTrainedModel, slots: int, length: int) -> None:
        # One token through the model shows what it caches, whatever its configuration calls it.
        probe = prefill(model, [[0]])
        self._limits = slots, -(-length // ROUND) * ROUND
        self._kv = probe.new_zeros((*probe.shape[:2], 0, probe.shape[3], 0, probe.shape[5]))

    def reserve(self, slots: int, length: int) -> None:
        """Have room for `length` positions in each of `slots` slots, and keep what there is."""
        old = self._kv
        have = old.shape[2], old.shape[4]
        if slots <= have[0] and length <= have[1]:
            return
        wanted = slots, max(-(-length // ROUND) * ROUND, FIRST)
        n, t = (
            have[i] if wanted[i] <= have[i] else min(max(wanted[i], 2 * have[i]), self._limits[i]) for i in range(2)
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
        """`positions` [n] int64 of the tokens, of which `longest` is the largest plus 1."""
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
        for cached, new in zip(self._kv[layer].unbind(), (k, v), strict=True):
            cached[self._rows, :, self._positions] = new[:, :, 0]
        keys, values = self._seen[layer].unbind()
        # The queries of a group share their key-value head: as rows of one small matrix they read it once.
        grouped = q.reshape(n, k.shape[1], heads // k.shape[1], d)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._bias, scale=scale)
        return out.reshape(n, 1, heads, v.shape[-1])


class Prefill(Causal):
    """Whole prefixes, one a row: causal attention that keeps the key-values it is shown."""

    def __init__(self) -> None:
        self.kv: list[Tensor] = []  # per layer [2, B, K, T, d]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.kv.append(torch.stack((k, v)))
        return super().attend(layer, q, k, v, scale)


def prefill(model: PreTrainedModel, prefixes: list[list[int]]) -> Tensor:
    """Key-values [layers, 2, B, K, T, d] of B prefixes of at most T tokens; past the end of a shorter one, rubbish.

    Rows are padded on the right, where causal attention does not look.
    """
    longest = max(map(len, prefixes))
    ids = torch.tensor([prefix + [0] * (longest - len(prefix)) for prefix in prefixes], device=model.device)  # [B, T]
    plan = Prefill()
    hidden(model, ids, torch.arange(longest, device=model.device).expand_as(ids), plan)
    return torch.stack(plan.kv)
