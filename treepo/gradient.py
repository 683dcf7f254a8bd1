"""The gradient of a packed row: forward and backward over its pieces, each token once, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from treepo.attention import Plan, PlanName, plan_for
from treepo.forest import Ints
from treepo.model import hidden, token_logprobs
from treepo.packing import PackedBatch
from treepo.pieces import Piece, most_held, pieces

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

    The result is that of one pass over the whole row, and every token is computed once, but at most `max_tokens`
    tokens, or one path if that is longer, keep activations at any time (`treepo.pieces`). A piece on which others
    depend waits, forward done, until the last of them has left its share of the gradient of its keys and values; its
    own backward pass picks that up on its way (`_Stack`).

    `loss` is called once per piece with a disjoint part of the trained rows. `forward()` is entered for forward passes
    alone: the place for autocast.
    """
    held: list[_Held] = []
    cut = pieces(batch, max_tokens)
    parents = {piece.parent for piece in cut}
    stack = _Stack(most_held(cut))
    for i, piece in enumerate(cut):
        while held and held[-1].index != piece.parent:
            held.pop().value.backward()  # type: ignore[no-untyped-call]
        past = held[-1].end if held else 0
        inner = plan_for(piece.prev, piece.end, past, name=plan, device=model.device)
        if i == 0:
            first = inner
        with forward():
            value = _score(
                model, batch, piece, inner if len(cut) == 1 else _OnStack(inner, stack, past), loss, temperature
            )
        this = _Held(i, past + piece.stop - piece.begin, value)
        if i in parents:
            held.append(this)
        else:
            this.value.backward()  # type: ignore[no-untyped-call]
    while held:
        held.pop().value.backward()  # type: ignore[no-untyped-call]
    return first


@dataclass(frozen=True, slots=True)
class _Held:
    """A piece whose forward pass is done."""

    index: int
    end: int  # tokens held by it and the pieces above
    value: Tensor


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
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._values: dict[tuple[int, int], Tensor] = {}  # by (layer, 0: keys, 1: values): [1, K, tokens, d]
        self._owed: dict[tuple[int, int], Tensor] = {}

    def push(self, name: tuple[int, int], begin: int, own: Tensor) -> Tensor:
        """Put `own` [1, K, t, d] at `begin`; returns [1, K, begin + t, d], which begins with the ancestors'."""
        if name not in self._values:
            self._values[name] = own.new_empty(*own.shape[:2], self._tokens, own.shape[3])
        # Not a change that automatic differentiation needs to know: whoever still needs the stack lies below.
        whole = self._values[name].data[:, :, : begin + own.shape[2]]
        whole[:, :, begin:] = own
        return whole

    def pop(self, name: tuple[int, int], begin: int, gradient: Tensor) -> Tensor:
        """The inverse for gradients: keeps what is the ancestors', and returns `own`'s, with what it was owed."""
        if name not in self._owed:
            self._owed[name] = torch.zeros_like(self._values[name])
        owed = self._owed[name][:, :, : gradient.shape[2]]
        owed += gradient
        own = owed[:, :, begin:].clone()
        owed[:, :, begin:] = 0
        return own


class _Push(torch.autograd.Function):
    """`_Stack.push` with `_Stack.pop` as its backward pass."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, stack: _Stack, name: tuple[int, int], begin: int) -> Tensor:
        ctx.stack, ctx.name, ctx.begin = stack, name, begin
        return stack.push(name, begin, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.stack.pop(ctx.name, ctx.begin, gradients[0]), None, None, None


class _OnStack:
    """The plan of a piece: it sees the keys and values of the pieces above in front of its own."""

    def __init__(self, inner: Plan, stack: _Stack, begin: int) -> None:
        self._inner, self._stack, self._begin = inner, stack, begin

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        push: Callable[..., Tensor] = _Push.apply
        k, v = (push(x, self._stack, (layer, i), self._begin) for i, x in enumerate((k, v)))
        return self._inner.attend(layer, q, k, v, scale)
