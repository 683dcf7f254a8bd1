"""A plan for CUDA: FlexAttention. Its kernels evaluate the rule, and skip the tiles in which no query sees a key.

Letters: T tokens of a row, P keys before it, H query heads, K key-value heads, d dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from treepo.errors import ConfigError
from treepo.models.attention.plan import Ints, visible, with_past


class Flex:
    """Exact attention of a packed row in one fused kernel, forward and backward. Nothing is copied per leaf.

    Which tiles have visible pairs is computed once per forward pass, for all layers. Lengths and trees differ from row
    to row. The rule reads them from tensors: with numbers in it, the kernels would be compiled again for each row.
    On a CPU there is no fused kernel and no backward pass, only a slow forward pass for tests.
    """

    def __init__(self, end: Ints, past: int, device: torch.device) -> None:
        ends, rows = (torch.as_tensor(x, device=device) for x in (with_past(end, past), past + np.arange(len(end))))

        def sees(_batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return visible(rows[q], kv, ends[kv])

        make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        self.mask = make(sees, None, None, len(end), past + len(end), device=device)

    def __str__(self) -> str:
        # Tiles that are partly visible, then those that are wholly visible.
        tiles = int(self.mask.kv_num_blocks.sum())
        if self.mask.full_kv_num_blocks is not None:
            tiles += int(self.mask.full_kv_num_blocks.sum())
        return f"flex, {tiles} tiles"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if len(q) != 1:
            raise ValueError(f"a packed pass has one row, not {len(q)}")
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast they may differ
        on_cuda = q.device.type == "cuda"
        if not on_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ConfigError(f"attention plan 'flex' has no gradients on {q.device}: take 'auto'")
        attention: Callable[..., Tensor] = _compiled(flex_attention) if on_cuda else flex_attention  # type: ignore[assignment]
        gqa = q.shape[1] != k.shape[1]
        return attention(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=gqa).transpose(1, 2)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
