"""A plan for CUDA: variable-length flash attention over chains, each with the keys of its path.

Letters: T tokens of a row, P keys before it, C chains, N keys of all chains together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import cast

import numpy as np
import torch
from torch import Tensor

from treepo.errors import ConfigError
from treepo.models.attention.chains import Take, chains_of
from treepo.models.attention.plan import Ints


class Varlen:
    """Exact attention of a packed row in one call without padding or masks, in half precision.

    The chains (`chain_starts`) divide the row in its order, so the queries are the row as it is. The keys of a chain
    are a copy of its ancestors and of itself. All chains together have N keys, about leaves times depth. Flash
    attention since version 2.1 aligns the causal mask to the last query and the last key of a sequence ("bottom
    right"). So a chain sees all of its ancestors, and itself causally. The advantage over `Flex`: nothing is compiled.
    """

    def __init__(self, prev: Ints, past: int, device: torch.device, attention: Callable[..., Tensor]) -> None:
        chains = chains_of(prev, past)
        own = [np.arange(past + chain.first, past + chain.first + chain.length) for chain in chains]
        index = [np.concatenate([chain.ancestors, rows]) for chain, rows in zip(chains, own, strict=True)]
        self._take = Take.plan(index, past + len(prev), device)
        lengths, keys = [chain.length for chain in chains], [chain.keys for chain in chains]
        cumulative = (torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in (lengths, keys))
        self._cumulative = tuple(cumulative)  # 2 of [C + 1]
        self._longest = max(lengths), max(keys)
        self._attention = attention

    def __str__(self) -> str:
        return f"varlen, {len(self._cumulative[0]) - 1} chains"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if len(q) != 1:
            raise ValueError(f"a packed pass has one row, not {len(q)}")
        _, kv_heads, keys, width = k.shape
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast they may differ
        k, v = (self._take(x[0].transpose(0, 1).reshape(keys, -1)).view(-1, kv_heads, width) for x in (k, v))
        gqa = q.shape[1] != kv_heads
        queries = q[0].transpose(0, 1).contiguous()  # [T, H, d]
        return self._attention(
            queries, k, v, *self._cumulative, *self._longest, scale=scale, window_size=(-1, 0), enable_gqa=gqa
        )[None]


def kernel() -> Callable[..., Tensor]:
    """PyTorch's `varlen_attn`. Raises `ConfigError` if this torch has none, or one without the options we need."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise ConfigError(f"attention plan 'varlen' is not in torch {torch.__version__}") from error
    if not {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        raise ConfigError(f"attention plan 'varlen' needs a newer torch than {torch.__version__}")
    return cast(Callable[..., Tensor], varlen_attn)
