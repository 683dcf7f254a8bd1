"""The gradient of packed rows: forward and backward over their pieces, each token once, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from treepo.forest import Ints
from treepo.learner.loss import Loss, TrainedTokens
from treepo.learner.packing import PackedBatch, Totals
from treepo.learner.row_pieces import Piece, pieces, tokens_held
from treepo.models.attention import Plan, PlanName, plan_for
from treepo.models.causal_lm import hidden, token_logprobs

RowLoss = Callable[[Ints, Tensor, Tensor], Tensor]
"""A scalar, to be summed, of trained rows [n], their log-probs [n] and the entropies [n] there (no gradient)."""


@dataclass(frozen=True, slots=True)
class LossRow:
    """A packed row, and the log-probs [T] that its loss compares the policy with."""

    batch: PackedBatch
    old_logprob: Tensor | None = None  # of the policy before the first update of the step; None: exactly on-policy
    reference_logprob: Tensor | None = None  # of the initial policy; None: the loss has no KL term


@dataclass(frozen=True, slots=True)
class Accumulated:
    """What a call of `accumulate` has found."""

    metrics: dict[str, float]  # of the loss, and `entropy/mean` in nats; parts that add up over the processes
    plan: str  # how the first row attended


def accumulate(
    model: PreTrainedModel,
    rows: Sequence[PackedBatch | LossRow],
    loss: Loss,
    *,
    totals: Totals | None = None,
    max_tokens: int = 16384,
    temperature: float = 1.0,
    plan: PlanName = "auto",
    forward: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Accumulated:
    """Add the gradient of `loss` over `rows` to the parameters of `model`. The caller steps the optimizer.

    `totals`: what the loss is a mean over; default: these rows. They differ where several calls or processes make up
    one optimizer step. `temperature` is that of the sampling. At most `max_tokens` tokens, or one path if that is
    longer, keep activations at any time. `forward()` is entered for forward passes alone: the place for autocast.
    """
    given = [row if isinstance(row, LossRow) else LossRow(row) for row in rows]
    totals = totals or Totals.of([row.batch for row in given])
    sums, first = _Sums(), ""
    for row in given:
        row_loss: RowLoss = partial(_loss_of_tokens, loss, row, totals, sums)
        if loss.over_responses and len(row.batch) > max_tokens:
            with torch.no_grad(), forward():
                known = packed_logprobs(model, row.batch, temperature=temperature, plan=plan)
            row_loss = _linear(row.batch, row_loss, *known)
        used = backward_row(
            model,
            row.batch,
            row_loss,
            max_tokens=max_tokens,
            temperature=temperature,
            plan=plan,
            forward=forward,
        )
        first = first or str(used)
    return Accumulated(sums.numbers(), first)


def _loss_of_tokens(
    loss: Loss, row: LossRow, totals: Totals, sums: _Sums, rows: Ints, logprob: Tensor, entropy: Tensor
) -> Tensor:
    """`loss` of some tokens of `row`; their parts of the metrics are added to `sums`."""
    tokens = TrainedTokens.of(
        row.batch, rows, logprob, row.old_logprob, row.reference_logprob, responses=loss.over_responses
    )
    value, metrics = loss(tokens, totals)
    with torch.no_grad():
        mean_entropy = (tokens.weight * entropy).sum() / totals.weight
        sums.add(metrics | {"loss/total": value.detach(), "entropy/mean": mean_entropy})
    return value


def _linear(batch: PackedBatch, loss: RowLoss, logprob: Tensor, entropy: Tensor) -> RowLoss:
    """A loss that may be computed piece by piece and has the gradient of `loss`, which wants the whole row at once.

    A loss depends on the parameters through the log-probs alone. So its gradient is that of the sum over the tokens of
    (its derivative by the log-prob, a constant) times the log-prob. `logprob` and `entropy` [T] are those of the row:
    computing them is one more forward pass, without activations.
    """
    trained = np.flatnonzero((batch.weight > 0) & (batch.prev >= 0))
    at = torch.as_tensor(trained, device=logprob.device)
    leaf = logprob[at].requires_grad_()
    (slope,) = torch.autograd.grad(loss(trained, leaf, entropy[at]), leaf)
    slopes = torch.zeros_like(logprob).index_copy(0, at, slope)

    def linear(rows: Ints, logprob: Tensor, _: Tensor) -> Tensor:
        return (slopes[torch.as_tensor(rows, device=logprob.device)] * logprob).sum()

    return linear


def backward_row(
    model: PreTrainedModel,
    batch: PackedBatch,
    loss: RowLoss,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    plan: PlanName = "auto",
    forward: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Plan:
    """Add the gradient of the sum of `loss` over the pieces of `batch` to the parameters; returns the first one's plan.

    The result is that of one pass over the whole row, and every token is computed once. At most `max_tokens` tokens, or
    one path if that is longer, keep activations at any time (`row_pieces`). A piece on which others depend waits after
    its forward pass until the last of them has left its share of the gradient of its keys and values. Its own backward
    pass picks that up (`_Stack`).

    `loss` is called once per piece with a disjoint part of the trained rows.
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
    whole; `accumulate` trains in pieces.
    """
    return packed_logprobs(model, batch, temperature=temperature, plan=plan, chunk=chunk)[0]


def packed_logprobs(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    plan: PlanName = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `logprobs`, and the entropies [T] of the distributions that the tokens are from (no gradient)."""
    ids = torch.as_tensor(batch.token_ids, device=model.device)
    positions = torch.as_tensor(batch.position, device=model.device)
    rows = np.flatnonzero((batch.weight > 0) & (batch.prev >= 0))
    way = plan_for(batch.prev, batch.end, name=plan, device=model.device)
    states = hidden(model, ids[None], positions[None], way)[0]
    wanted = torch.as_tensor(rows, device=model.device)
    given = states.index_select(0, torch.as_tensor(batch.prev[rows], device=model.device))
    found, entropy = token_logprobs(model, given, ids[wanted], temperature=temperature, chunk=chunk)
    zero = found.new_zeros(len(batch))
    return zero.index_copy(0, wanted, found), zero.index_copy(0, wanted, entropy)


def _score(
    model: PreTrainedModel, batch: PackedBatch, piece: Piece, plan: Plan, loss: RowLoss, temperature: float
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


class _Sums:
    """Scalars that add up; a device is asked for them only once."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._found[name] = self._found[name] + value if name in self._found else value

    def numbers(self) -> dict[str, float]:
        if not self._found:
            return {}
        return dict(zip(self._found, torch.stack(list(self._found.values())).tolist(), strict=True))
