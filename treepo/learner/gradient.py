"""The gradient of a packed row: forward and backward over its pieces, each token once, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from treepo.forest import Ints
from treepo.learner.packing import PackedBatch
from treepo.learner.row_pieces import Piece, pieces, tokens_held
from treepo.models.attention import Plan, PlanName, plan_for
from treepo.models.causal_lm import hidden, token_logprobs

Loss = Callable[[Ints, Tensor, Tensor], Tensor]
"""A scalar, to be summed, of trained rows [n], their log-probs [n] and the entropies [n] there (no gradient)."""


def accumulate(
    model: PreTrainedModel,
    batch: PackedBatch,
    loss: Loss,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    plan: PlanName = "auto",
    forward: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Plan:
    """Add the gradient of the sum of `loss` over the pieces of `batch` to the parameters; returns the first one's plan.

    The result is that of one pass over the whole row, and every token is computed once. At most `max_tokens` tokens, or
    one path if that is longer, keep activations at any time (`row_pieces`). A piece on which others depend
    waits after its forward pass until the last of them has left its share of the gradient of its keys and values. Its
    own backward pass picks that up (`_Stack`).

    `loss` is called once per piece with a disjoint part of the trained rows. `forward()` is entered for forward passes
    alone: the place for autocast.
    """
    held: list[tuple[int, Tensor]] = []  # pieces whose forward pass is done, and their losses
    cut = pieces(batch, max_tokens)
    tokens, parents = tokens_held(cut), {piece.parent for piece in cut}
    stack = _Stack(int(tokens.max()))
    for i, piece in enumerate(cut):
        while held and held[-1][0] != piece.parent:
            held.pop()[1].backward()  # type: ignore[no-untyped-call]
        past = int(tokens[piece.parent]) if held else 0
        inner = plan_for(piece.prev, piece.end, past, name=plan, device=model.device)
        if i == 0:
            first = inner
        with forward():
            outer = inner if len(cut) == 1 else _OnStack(inner, stack, past, awaited=i in parents)
            value = _score(model, batch, piece, outer, loss, temperature)
        if i in parents:
            held.append((i, value))
        else:
            value.backward()  # type: ignore[no-untyped-call]
    while held:
        held.pop()[1].backward()  # type: ignore[no-untyped-call]
    return first


def logprobs(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    plan: PlanName = "auto",
    chunk: int | None = None,
) -> Tensor:
    """Log-prob [T] in nats of each packed token given its path, under the policy at `temperature`.

    Float32, or float64 for a float64 model. 0.0 where no trained leaf needs it (`weight` 0: prompts). Every token
    goes through the model once, whatever the number of leaves below it, and gradients are exact. The row is computed
    whole: `gradient` trains in pieces.
    """
    ids = torch.as_tensor(batch.token_ids, device=model.device)
    positions = torch.as_tensor(batch.position, device=model.device)
    rows = np.flatnonzero((batch.weight > 0) & (batch.prev >= 0))
    way = plan_for(batch.prev, batch.end, name=plan, device=model.device)
    states = hidden(model, ids[None], positions[None], way)[0]
    wanted = torch.as_tensor(rows, device=model.device)
    given = states.index_select(0, torch.as_tensor(batch.prev[rows], device=model.device))
    found, _ = token_logprobs(model, given, ids[wanted], temperature=temperature, chunk=chunk)
    return found.new_zeros(len(batch)).index_copy(0, wanted, found)


def _score(
    model: PreTrainedModel, batch: PackedBatch, piece: Piece, plan: Plan, loss: Loss, temperature: float
) -> Tensor:
    ids, positions = (
        torch.as_tensor(x[piece.begin : piece.stop], device=model.device) for x in (batch.token_ids, batch.position)
    )
    states = hidden(model, ids[None], positions[None], plan)[0]
    given = states.index_select(0, torch.as_tensor(batch.prev[piece.targets] - piece.begin, device=model.device))
    wanted = torch.as_tensor(batch.token_ids[piece.targets], device=model.device)
    logprob, entropy = token_logprobs(model, given, wanted, temperature=temperature)
    return loss(piece.targets, logprob, entropy)


class _Stack:
    """Keys and values of the pieces held, one after the other as on a path, and the gradients that they are owed.

    Pieces come and go depth first: what lies below a piece's end is its own and its ancestors' until its backward pass
    is done, and what is above is anyone's. So all share one allocation, and nothing is copied to be seen from below.
    Gradients are owed to no more than the pieces that something was computed below, and are given up with them.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens  # the most on it at once
        self._values: dict[tuple[int, int], Tensor] = {}  # by (layer, 0: keys, 1: values): [1, K, tokens, d]
        self._owed: dict[tuple[int, int], Tensor] = {}  # by the same: [1, K, as many as are owed any, d]

    def push(self, name: tuple[int, int], begin: int, own: Tensor) -> Tensor:
        """Put `own` [1, K, t, d] at `begin`; returns [1, K, begin + t, d], which begins with the ancestors'."""
        if name not in self._values:
            self._values[name] = own.new_empty(*own.shape[:2], self._tokens, own.shape[3])
        # Not a change that automatic differentiation needs to know: whoever still needs the stack lies below.
        whole = self._values[name].data[:, :, : begin + own.shape[2]]
        whole[:, :, begin:] = own
        return whole

    def pop(self, name: tuple[int, int], begin: int, gradient: Tensor, *, awaited: bool) -> Tensor:
        """The inverse for gradients: keeps what is the ancestors', and returns `own`'s, with what it was owed.

        `awaited`: something hangs off `own`, which therefore is owed something.
        """
        owed = self._owed.get(name, gradient[:, :, :0])
        if owed.shape[2] < begin:
            owed = self._owed[name] = F.pad(owed, (0, 0, 0, begin - owed.shape[2]))
        owed[:, :, :begin] += gradient[:, :, :begin]
        own = gradient[:, :, begin:]
        if awaited:
            own = own + owed[:, :, begin:]
            self._owed[name] = owed[:, :, :begin].clone()
        return own


class _Push(torch.autograd.Function):
    """`_Stack.push` with `_Stack.pop` as its backward pass."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, stack: _Stack, name: tuple[int, int], begin: int, awaited: bool) -> Tensor:
        ctx.stack, ctx.name, ctx.begin, ctx.awaited = stack, name, begin, awaited
        return stack.push(name, begin, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.stack.pop(ctx.name, ctx.begin, gradients[0], awaited=ctx.awaited), None, None, None, None


class _OnStack:
    """The plan of a piece: it sees the keys and values of the pieces above in front of its own."""

    def __init__(self, inner: Plan, stack: _Stack, begin: int, *, awaited: bool) -> None:
        self._inner, self._stack, self._begin, self._awaited = inner, stack, begin, awaited

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        push: Callable[..., Tensor] = _Push.apply
        k, v = (push(x, self._stack, (layer, i), self._begin, self._awaited) for i, x in enumerate((k, v)))
        return self._inner.attend(layer, q, k, v, scale)
