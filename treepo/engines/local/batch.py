"""The rows that are decoded together, as tensors: where each one is, how it draws, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treepo.engines import Sampling
from treepo.engines.local.shared_pages import Name
from treepo.engines.local.token_sampling import Draw
from treepo.engines.local.tree_cache import Kept, Span


@dataclass(slots=True)
class Stats:
    """What the engine has computed since it was made; the caller may read and reset it at any time."""

    prefilled_tokens: int = 0  # of prompts, once per tree
    decoded_tokens: int = 0  # one per row and step; steps of cancelled segments included
    steps: int = 0
    copied_tokens: int = 0  # of prefixes, from a tree's key-values into a slot or a page
    continued_tokens: int = 0  # of prefixes that still lay in the slot where the parent had ended


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """A segment that is being decoded."""

    prefix: int  # tokens before it, N
    last: int  # token of the prefix: the first input
    max_tokens: int
    seed: int  # names the segment
    draws: int  # seed of what is drawn: as a rule the same
    sampling: Sampling
    stop_ids: frozenset[int]
    kept: Kept  # by its tree
    spans: list[Span]  # the key-values of its prefix, all but the last token's
    pages: list[Name]  # those that its prefix fills
    tokens: list[int] = field(default_factory=list)  # drawn so far
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] | None = None  # None: not asked
    begin: int = 0  # the position that its slot begins with; it reads those before in pages
    ended: bool = False  # its segment is complete, and lies in its slot


@dataclass(slots=True)
class Batch:
    """The rows of a run of steps during which no row joins or leaves, as tensors."""

    ids: Tensor  # [n] int64: the tokens that go in next
    positions: Tensor  # [n] int64: theirs
    ends: Tensor  # [n] int64: the position of the last token that the segment may have
    stops: Tensor  # [sets, V] bool: the stop ids of each set
    stop_set: Tensor | None  # [n] int64: the set of each row; None: no row has any
    draw: Draw
    longest: int  # largest place in a slot plus 1
    left: int  # steps until some row must end
    entropies: bool  # some row asks for them
    steps: list[tuple[Tensor, ...]]  # tokens, log-probs and maybe entropies [n] that no row has been given yet

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
            Draw.of([(row.sampling, row.draws, len(row.tokens)) for row in rows], vocabulary, device),
            max(position - row.begin for position, row in zip(positions, rows, strict=True)) + 1,
            min(row.max_tokens - len(row.tokens) for row in rows),
            any(row.entropies is not None for row in rows),
            [],
        )

    def advance(self, logits: Tensor) -> list[int]:
        """Draw from `logits` [n, V]; the rows whose segments end with the token drawn."""
        self.ids, logprobs = self.draw(logits)
        self.steps.append((self.ids, logprobs, *([self.draw.entropies(logits)] if self.entropies else [])))
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

    def flush(self, rows: Sequence[Row]) -> None:
        """Hand the tokens of the steps since the last call to the `rows`."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        tokens, logprobs, *entropies = (torch.stack(values, 1).tolist() for values in zip(*steps, strict=True))
        for i, row in enumerate(rows):
            row.tokens += tokens[i]
            row.logprobs += logprobs[i]
            if row.entropies is not None:
                row.entropies += entropies[0][i]
