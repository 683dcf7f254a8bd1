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
from treepo.learner.loss import Loss, TrainedTokens, needs_reference, over_responses, shared_tokens, wrong_result
from treepo.learner.packing import PackedBatch, Totals
from treepo.learner.row_pieces import pieces, tokens_held
from treepo.models.attention import Plan, PlanName, plan_for
from treepo.models.causal_lm import hidden, token_logprobs

RowLoss = Callable[[Ints, Tensor, Tensor], Tensor]
"""A scalar function of n trained rows [n], their log-probs [n] and the entropies [n] there (without gradient)."""


@dataclass(frozen=True, slots=True)
class LossRow:
    """A packed row, and the log-probs [T] of other policies that its loss needs. `logprobs` computes them."""

    batch: PackedBatch
    old_logprob: Tensor | None = None  # of the policy before the step's first update; None: equal to the current one
    reference_logprob: Tensor | None = None  # of the initial policy, for a loss with `needs_reference`


@dataclass(frozen=True, slots=True)
class Accumulated:
    """What a call of `accumulate` has found. Without a trained token, both are empty."""

    metrics: dict[str, float]  # those of the loss, `loss/total`, and `entropy/mean` in nats; they add up over calls
    plan: str  # the attention plan of the first row


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

    `rows`: what `pack` returns. A plain `PackedBatch` is on-policy: the ratio is exactly 1. For several updates on the
    same samples, or a loss with `needs_reference`, give a `LossRow` with the log-probs of the other policies.
    `totals`: what the loss is a mean over; default: these rows. They differ if several calls or processes make up one
    optimizer step. `temperature` is that of the sampling. At most `max_tokens` tokens keep activations at any time, or
    one path if that is longer. `forward()` returns a context that is entered for forward passes only, such as
    `torch.autocast`.

    Raises `ValueError` if the rows do not fit the loss or the model, or the loss returns no scalar. Whether the loss
    and the gradient are finite is not checked: `torch.nn.utils.clip_grad_norm_` returns the norm, which says it.
    """
    given = [row if isinstance(row, LossRow) else LossRow(row) for row in rows]
    totals = totals or Totals.of([row.batch for row in given])
    for row in given:
        _require_fit(model, row, loss)
    sums, first = _Sums(), ""
    for row in given:
        if not row.batch.weight.any():  # nothing was sampled
            continue
        row_loss: RowLoss = partial(_loss_of_tokens, loss, row, totals, sums)
        if over_responses(loss) and len(row.batch) > max_tokens:
            with torch.no_grad(), forward():
                known = logprobs_and_entropies(model, row.batch, temperature=temperature, plan=plan)
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


def _require_fit(model: PreTrainedModel, row: LossRow, loss: Loss) -> None:
    """Raise `ValueError` unless `row` fits the loss and the model."""
    batch = row.batch
    if batch.shared_tokens != (wanted := shared_tokens(loss)):
        raise ValueError(
            f"the row was packed with shared_tokens {batch.shared_tokens!r}, and the loss has {wanted!r}: "
            "pack(..., shared_tokens=...) must be told the same"
        )
    if needs_reference(loss) and row.reference_logprob is None:
        raise ValueError(
            "the loss needs the log-probs of the initial policy: give LossRow(row, reference_logprob=logprobs(...))"
        )
    for name, given in (("old_logprob", row.old_logprob), ("reference_logprob", row.reference_logprob)):
        if given is not None and given.shape != (len(batch),):
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, and the row has {len(batch)} tokens")
    vocabulary = model.config.vocab_size
    if len(batch) and (largest := int(batch.token_ids.max())) >= vocabulary:
        raise ValueError(f"the row has the token id {largest}, and the model only ids below {vocabulary}")


def _loss_of_tokens(
    loss: Loss, row: LossRow, totals: Totals, sums: _Sums, rows: Ints, logprob: Tensor, entropy: Tensor
) -> Tensor:
    """`loss` of some tokens of `row`. Their parts of the metrics are added to `sums`."""
    tokens = TrainedTokens.of(
        row.batch, rows, logprob, row.old_logprob, row.reference_logprob, responses=over_responses(loss)
    )
    found = loss(tokens, totals)
    if reason := wrong_result(found):
        raise ValueError(f"the loss {reason}")
    value, metrics = found
    if not value.requires_grad:
        raise ValueError("the loss does not depend on tokens.logprob, so it has no gradient")
    with torch.no_grad():
        mean_entropy = (tokens.weight * entropy).sum() / totals.weight
        sums.add(metrics | {"loss/total": value.detach(), "entropy/mean": mean_entropy})
    return value


def _linear(batch: PackedBatch, loss: RowLoss, logprob: Tensor, entropy: Tensor) -> RowLoss:
    """A loss with the gradient of `loss` that can be computed piece by piece. `loss` needs the whole row at once.

    A loss depends on the parameters only through the log-probs. So it has the same gradient as the sum over the tokens
    of d times the log-prob, where the constant d is the derivative of the loss by this log-prob. `logprob` and
    `entropy` [T] are those of the row: one more forward pass, which keeps no activations.
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
    """Add the gradient of `loss`, summed over the pieces of `batch`, to the parameters; return the first piece's plan.

    The gradient is that of one pass over the whole row, and every token is computed once. At most `max_tokens` tokens
    keep activations at any time, or one path if that is longer (`row_pieces`). A piece that others hang off is kept
    after its forward pass, until all of them have left their shares of the gradient of its keys and values. Its own
    backward pass adds these shares (`_Stack`).

    `loss` is called once per piece with a disjoint part of the trained rows.
    """
    held: list[tuple[int, Tensor]] = []  # pieces whose forward pass is done, and their losses
    parts = pieces(batch, max_tokens)
    tokens, parents = tokens_held(parts), {piece.parent for piece in parts}
    stack = _Stack(int(tokens.max()))
    for i, piece in enumerate(parts):
        while held and held[-1][0] != piece.parent:
            held.pop()[1].backward()  # type: ignore[no-untyped-call]
        past = int(tokens[piece.parent]) if held else 0
        inner = plan_for(piece.prev, piece.end, past, name=plan, device=model.device)
        if i == 0:
            first = inner
        with forward():
            outer = inner if len(parts) == 1 else _OnStack(inner, stack, past, awaited=i in parents)
            span = slice(piece.begin, piece.stop)
            value = loss(piece.targets, *_scored(model, batch, span, piece.targets, outer, temperature))
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

    Float32, or float64 for a float64 model. 0.0 for tokens that are not trained on (`weight` 0), such as prompts. Every
    token goes through the model once, however many leaves share it. The row is computed whole, with exact gradients:
    enter `torch.no_grad()` for a `LossRow`.
    """
    return logprobs_and_entropies(model, batch, temperature=temperature, plan=plan, chunk=chunk)[0]


def logprobs_and_entropies(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    plan: PlanName = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `logprobs`, and the entropies [T] of the distributions at these tokens (without gradient)."""
    rows = np.flatnonzero((batch.weight > 0) & (batch.prev >= 0))
    attending = plan_for(batch.prev, batch.end, name=plan, device=model.device)
    found = _scored(model, batch, slice(0, len(batch)), rows, attending, temperature, chunk)
    at = torch.as_tensor(rows, device=model.device)
    logprob, entropy = (x.new_zeros(len(batch)).index_copy(0, at, x) for x in found)
    return logprob, entropy


def _scored(
    model: PreTrainedModel,
    batch: PackedBatch,
    span: slice,
    rows: Ints,
    plan: Plan,
    temperature: float,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs [n] and entropies [n] of the tokens `rows` [n] of `batch`, which rows in `span` predict."""
    ids, positions = (torch.as_tensor(x[span], device=model.device) for x in (batch.token_ids, batch.position))
    states = hidden(model, ids[None], positions[None], plan)[0]
    predicting = states.index_select(0, torch.as_tensor(batch.prev[rows] - span.start, device=model.device))
    wanted = torch.as_tensor(batch.token_ids[rows], device=model.device)
    return token_logprobs(model, predicting, wanted, temperature=temperature, chunk=chunk)


class _Stack:
    """Keys and values of the pieces held, one after the other as on a path, and the gradients collected for them.

    Pieces are visited depth first. Until the backward pass of a piece is done, the stack up to the piece's end holds
    its ancestors and itself. The rest of the stack is free for the pieces that hang off it. So all pieces share one
    allocation, and nothing is copied for a piece to see its ancestors. Gradients are collected only for pieces that
    another piece has attended to, and are removed with these.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens  # the most that it holds at once
        self._values: dict[tuple[int, int], Tensor] = {}  # by (layer, 0: keys, 1: values): [1, K, tokens, d]
        self._owed: dict[tuple[int, int], Tensor] = {}  # by the same: [1, K, tokens with a gradient so far, d]

    def push(self, name: tuple[int, int], begin: int, own: Tensor) -> Tensor:
        """Put `own` [1, K, t, d] at `begin`; returns [1, K, begin + t, d], the ancestors' first, then `own`."""
        if name not in self._values:
            self._values[name] = own.new_empty(*own.shape[:2], self._tokens, own.shape[3])
        # `.data` hides the change from automatic differentiation. That is safe: what is still needed is before `begin`.
        whole = self._values[name].data[:, :, : begin + own.shape[2]]
        whole[:, :, begin:] = own
        return whole

    def pop(self, name: tuple[int, int], begin: int, gradient: Tensor, *, awaited: bool) -> Tensor:
        """The inverse of `push` for gradients: keeps the ancestors' part, and returns the whole gradient of `own`.

        `awaited`: other pieces hang off `own`. Then the gradients that they have left for `own` are added.
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
    """The plan of a piece: before its own keys and values come those of the pieces that it hangs off."""

    def __init__(self, inner: Plan, stack: _Stack, begin: int, *, awaited: bool) -> None:
        self._inner, self._stack, self._begin, self._awaited = inner, stack, begin, awaited

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        push: Callable[..., Tensor] = _Push.apply
        k, v = (push(x, self._stack, (layer, i), self._begin, self._awaited) for i, x in enumerate((k, v)))
        return self._inner.attend(layer, q, k, v, scale)


class _Sums:
    """Scalars that add up. They are copied from their device only once, at the end."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._found[name] = self._found[name] + value if name in self._found else value

    def numbers(self) -> dict[str, float]:
        if not self._found:
            return {}
        return dict(zip(self._found, torch.stack(list(self._found.values())).tolist(), strict=True))
