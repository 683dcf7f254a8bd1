"""The fast plan of a CPU: blocks on the diagonal and unmasked rectangles below it, merged by their log-sum-exps.

Letters: T tokens of a row, P keys before it, H query heads, K key-value heads, d dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treepo.models.attention.plan import Dense, Ints, visible
from treepo.models.attention.tiling import Tiling

# These are private to PyTorch, so `refused` tries whether they do what we need. None: this torch does not have them.
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


@dataclass
class _Tile:
    """Some rows against some keys: a block on the diagonal, or a rectangle in which all is seen."""

    queries: slice  # rows
    keys: slice  # key j < P is of the past, P + i that of row i
    causal: bool = False
    mask: Tensor | None = None  # [queries, keys] to be added to the scores

    @property
    def diagonal(self) -> bool:
        return self.causal or self.mask is not None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention [1, H, queries, d] within the tile, and the log-sum-exp [1, H, queries] of its scores."""
        q, k, v, mask = self._parts(q, k, v)
        out: tuple[Tensor, Tensor] = _forward(q, k, v, 0.0, self.causal, attn_mask=mask, scale=scale)
        return out

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tile's share of the gradients of its q, k and v, given the output and log-sum-exp of all tiles."""
        grad, out, lse = (x[:, :, self.queries] for x in (grad, out, lse))
        q, k, v, mask = self._parts(q, k, v)
        found: tuple[Tensor, Tensor, Tensor] = _backward(
            grad, q, k, v, out, lse, 0.0, self.causal, attn_mask=mask, scale=scale
        )
        return found

    def _parts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.mask is not None:
            self.mask = self.mask.to(q.dtype)
        return q[:, :, self.queries], k[:, :, self.keys], v[:, :, self.keys], self.mask


class Blocks:
    """Exact attention of a packed row from views of it. Nothing is gathered, padded or copied per leaf.

    The row is divided into tiles (`tiling_of`). A *rectangle* needs no mask: rows are in depth-first order, so the rows
    below a run of tokens are one contiguous range of queries, and all of them see the whole run. A *block* lies on the
    diagonal. It is a run of tokens, plainly causal, or a small subtree under a mask. The blocks hold every row once.
    The past is one more rectangle. Each tile is a call of PyTorch's flash attention for CPUs. The call also returns the
    log-sum-exp of the scores, with which the outputs of the tiles are merged.

    For the backward pass, q, k, v, the merged output and its log-sum-exp are kept. Given these, the kernel's own
    backward pass returns each tile's share of the exact gradient.
    """

    def __init__(self, tiling: Tiling, end: Ints, past: int) -> None:
        self.blocks = [_Tile(slice(a, b), slice(past + a, past + b), causal=True) for a, b in tiling.causal]
        self.blocks += [_Tile(slice(a, b), slice(past + a, past + b), mask=_mask(end, a, b)) for a, b in tiling.masked]
        self.rectangles = [_Tile(slice(a, b), slice(past + c, past + d)) for a, b, c, d in tiling.rectangles]
        if past:
            self.rectangles.append(_Tile(slice(0, len(end)), slice(0, past)))

    def __str__(self) -> str:
        return f"{len(self.blocks)} blocks + {len(self.rectangles)} rectangles"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if len(q) != 1:
            raise ValueError(f"a packed pass has one row, not {len(q)}")
        # Under autocast, rotary embeddings and norms may give q and k another precision than v.
        q, k = q.to(v.dtype), k.to(v.dtype)
        # The kernel assumes that the last dimension is dense. It does not check.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out: Tensor = _Attention.apply(q, k, v, scale, self)  # type: ignore[no-untyped-call]
        return out


class _Attention(torch.autograd.Function):
    """q [1, H, T, d], k and v [1, K, P + T, d] -> [1, T, H, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Blocks) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        _, heads, tokens, width = q.shape
        out = q.new_empty(1, tokens, heads, width, dtype=exact).transpose(1, 2)
        lse = q.new_empty(1, tokens, heads, dtype=exact).transpose(1, 2)
        for tile in plan.blocks:
            out[:, :, tile.queries], lse[:, :, tile.queries] = tile.forward(q, k, v, scale)
        for tile in plan.rectangles:
            part, part_lse = tile.forward(q, k, v, scale)
            here, here_lse = out[:, :, tile.queries], lse[:, :, tile.queries]
            here.lerp_(part.to(exact), torch.sigmoid(part_lse - here_lse)[..., None])
            torch.logaddexp(here_lse, part_lse, out=here_lse)
        out = out.to(q.dtype).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad, out = (x.transpose(1, 2) for x in (grads[0], out))
        totals = [torch.empty_like(x, dtype=lse.dtype) for x in (q, k, v)]
        past = k.shape[2] - q.shape[2]
        for total in totals[1:]:
            total[:, :, :past] = 0.0
        for tile in (*ctx.plan.blocks, *ctx.plan.rectangles):
            parts = tile.backward(grad, q, k, v, out, lse, ctx.scale)
            for total, part, rows in zip(totals, parts, (tile.queries, tile.keys, tile.keys), strict=True):
                if tile.diagonal:  # the blocks come first and hold every row once
                    total[:, :, rows] = part
                else:
                    total[:, :, rows] += part
        dq, dk, dv = (total.to(q.dtype) for total in totals)
        return dq, dk, dv, None, None


def _mask(end: Ints, begin: int, stop: int) -> Tensor:
    rows = np.arange(begin, stop)
    seen = torch.as_tensor(visible(rows[:, None], rows, end[begin:stop]))
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


@cache
def refused() -> str:
    """Why this build of PyTorch cannot run `Blocks`; empty if it can. A small tree is tried."""
    end = np.array([4, 3, 3, 4])
    tiling = Tiling(0, 4, 0.0, causal=((0, 1), (3, 4)), masked=((1, 3),), rectangles=((1, 4, 0, 1),))
    results = []
    try:
        for plan in (Dense(end, 1, torch.device("cpu")), Blocks(tiling, end, 1)):
            q, k, v = (torch.arange(n * 2.0).cos().view(1, -1, rows, 2) for n, rows in ((8, 4), (5, 5), (5, 5)))
            with torch.enable_grad():
                out = plan.attend(0, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), 0.7)
                results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    if all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*results, strict=True)):
        return ""
    return f"torch {torch.__version__} computes flash attention for CPUs differently"
