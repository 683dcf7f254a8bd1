"""The rows that are decoded together, as tensors: where each one is, how it draws, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treepo.engines import Sampling
from treepo.engines.draw import Draw


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """A segment that is being decoded."""

    prefix: int  # tokens before it, N
    last: int  # token of the prefix: the first input
    max_tokens: int
    seed: int
    sampling: Sampling
    stop_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)  # drawn so far
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """The rows of a run of steps during which no row joins or leaves, as tensors."""

    ids: Tensor  # [n] int64: the tokens that go in next
    positions: Tensor  # [n] int64: theirs
    ends: Tensor  # [n] int64: the position of the last token that the segment may have
    stops: Tensor  # [sets, V] bool: the stop ids of each set
    stop_set: Tensor | None  # [n] int64: the set of each row; None: no row has any
    draw: Draw
    longest: int  # largest position plus 1
    left: int  # steps until some row must end
    steps: list[tuple[Tensor, Tensor]]  # tokens and log-probs [n] that no row has been given yet

    @classmethod
    def of(cls, rows: Sequence[Row], model: PreTrainedModel) -> Batch:
        device, vocabulary = model.device, model.config.vocab_size
        positions = [row.prefix - 1 + len(row.tokens) for row in rows]
        sets = list(dict.fromkeys(row.stop_ids for row in rows))
        stops = torch.zeros(len(sets), vocabulary, dtype=torch.bool)
        for i, ids in enumerate(sets):
            stops[i, list(ids)] = True
        return cls(
            torch.tensor([row.tokens[-1] if row.tokens else row.last for row in rows], device=device),
            torch.tensor(positions, device=device),
            torch.tensor([row.prefix - 1 + row.max_tokens for row in rows], device=device),
            stops.to(device),
            torch.tensor([sets.index(row.stop_ids) for row in rows], device=device) if any(sets) else None,
            Draw.of([(row.sampling, row.seed, len(row.tokens)) for row in rows], vocabulary, device),
            max(positions) + 1,
            min(row.max_tokens - len(row.tokens) for row in rows),
            [],
        )

    def advance(self, logits: Tensor) -> list[int]:
        """Draw from `logits` [n, V]; the rows whose segments end with the token drawn."""
        self.ids, logprobs = self.draw(logits)
        self.steps.append((self.ids, logprobs))
        self.positions += 1
        self.longest += 1
        self.left -= 1
        if self.stop_set is None and self.left > 0:
            return []  # without asking the device
        ended = self.positions >= self.ends
        if self.stop_set is not None:
            ended |= self.stops[self.stop_set, self.ids]
        rows: list[int] = ended.nonzero()[:, 0].tolist()
        return rows

    def drawn(self) -> tuple[list[list[int]], list[list[float]]]:
        """The tokens and log-probs of the steps since the last call, per row."""
        steps, self.steps = self.steps, []
        if not steps:
            return [[] for _ in self.ids], [[] for _ in self.ids]
        tokens, logprobs = zip(*steps, strict=True)
        return torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist()
