"""The gradient of a packed row: forward and backward over its pieces, each token once, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treepo.attention import Plan, PlanName, plan_for
from treepo.forest import Ints
from treepo.model import hidden, token_logprobs
from treepo.packing import PackedBatch
from treepo.pieces import Piece, pieces

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
    depend waits, forward done, until the last of them has added to the gradient of its keys and values; then its own
    backward pass starts from these together with its loss.

    `loss` is called once per piece with a disjoint part of the trained rows. `forward()` is entered for forward passes
    alone: the place for autocast.
    """
    held: list[_Held] = []
    cut = pieces(batch, max_tokens)
    parents = {piece.parent for piece in cut}
    for i, piece in enumerate(cut):
        while held and held[-1].index != piece.parent:
            held.pop().backward()
        past = sum(above.piece.stop - above.piece.begin for above in held)
        inner = plan_for(piece.prev, piece.end, past, name=plan, device=model.device)
        if i == 0:
            first = inner
        this = _Held(i, piece, _InTree(inner, tuple(held), keep=i in parents))
        with forward():
            this.value = _score(model, batch, piece, this.plan, loss, temperature)
        if i in parents:
            held.append(this)
        else:
            this.backward()
    while held:
        held.pop().backward()
    return first


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


class _InTree:
    """The plan of a piece: the key-values of the pieces above in front, and its own kept for those below."""

    def __init__(self, inner: Plan, above: tuple[_Held, ...], *, keep: bool) -> None:
        self.inner, self.above, self.keep = inner, above, keep
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, in the graph of this piece
        self.shown: dict[int, tuple[Tensor, Tensor]] = {}  # the same outside of it: gradients from below gather here

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.keep:
            self.own[layer] = k, v
            self.shown[layer] = k.detach().requires_grad_(), v.detach().requires_grad_()
        if self.above:
            past = [piece.plan.shown[layer] for piece in self.above]
            k = torch.cat([*(key for key, _ in past), k], dim=2)
            v = torch.cat([*(value for _, value in past), v], dim=2)
        return self.inner.attend(layer, q, k, v, scale)


@dataclass
class _Held:
    """A piece whose forward pass is done."""

    index: int
    piece: Piece
    plan: _InTree
    value: Tensor = field(default_factory=lambda: torch.zeros(()))

    def backward(self) -> None:
        roots: list[Tensor] = [self.value]
        gradients: list[Tensor | None] = [None]
        for kept, gathered in self._given():
            roots.append(kept)
            gradients.append(gathered)
        torch.autograd.backward(roots, gradients)

    def _given(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, and the gradients that the pieces below have left for them."""
        for layer, own in self.plan.own.items():
            for kept, shown in zip(own, self.plan.shown[layer], strict=True):
                if shown.grad is not None:
                    yield kept, shown.grad
