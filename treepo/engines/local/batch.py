"""The rows that are decoded together, as tensors: where each one is, how it draws, and when it ends."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treepo.engines import Sampling
from treepo.engines.local.kv_store import KVStore
from treepo.engines.local.prefix import Prefix
from treepo.engines.local.shared_pages import PageName
from treepo.engines.local.token_sampling import Draw


@dataclass(slots=True)
class LocalStats:
    """What the engine has computed since it was made; the caller may read and reset it at any time."""

    prefilled_tokens: int = 0  # of prefixes whose key-values were missing, as a rule of each prompt once
    decoded_tokens: int = 0  # one per row and step; steps of cancelled segments included
    steps: int = 0
    copied_tokens: int = 0  # of prefixes, from a store of key-values into a slot or a page
    continued_tokens: int = 0  # of prefixes that still lay in the slot where the segment before had ended


@dataclass(slots=True, eq=False, kw_only=True)
class DecodingRow:
    """A segment that is decoded, or waits to be."""

    prefix: Prefix
    max_tokens: int
    name: Hashable  # of the block that will hold its key-values
    seed: int  # of its random numbers
    sampling: Sampling
    stop_ids: frozenset[int]
    store: KVStore  # where the blocks of its prefix are, and where its own will be
    pages: list[PageName]  # those that its prefix fills
    tokens: list[int] = field(default_factory=list)  # drawn so far
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] | None = None  # None: not asked for
    begin: int = 0  # the first position in its slot; it reads the positions before in pages
    ended: bool = False  # its segment is complete, and its key-values lie in its slot


@dataclass(slots=True)
class Batch:
    """The rows that are decoded together, as tensors, for as long as no row joins or leaves."""

    ids: Tensor  # [n] int64: the tokens that go in next
    positions: Tensor  # [n] int64: theirs
    ends: Tensor  # [n] int64: the position of the last token that the segment may have
    stops: Tensor  # [sets, V] bool: the stop ids of each set
    stop_set: Tensor | None  # [n] int64: the set of each row; None: no row has any
    draw: Draw
    longest: int  # largest place in a slot plus 1
    left: int  # steps until some row must end
    entropies: bool  # some row asks for them
    steps: list[tuple[Tensor, ...]]  # [n] each: tokens, log-probs, maybe entropies; not handed to the rows yet

    @classmethod
    def of(cls, rows: Sequence[DecodingRow], model: PreTrainedModel) -> Batch:
        device, vocabulary = model.device, model.config.vocab_size
        positions = [row.prefix.length - 1 + len(row.tokens) for row in rows]
        sets = list(dict.fromkeys(row.stop_ids for row in rows))
        stops = torch.zeros(len(sets), vocabulary, dtype=torch.bool)
        for i, ids in enumerate(sets):
            stops[i, list(ids)] = True
        return cls(
            torch.tensor([row.tokens[-1] if row.tokens else row.prefix.last for row in rows], device=device),
            torch.tensor(positions, device=device),
            torch.tensor([row.prefix.length - 1 + row.max_tokens for row in rows], device=device),
            stops.to(device),
            torch.tensor([sets.index(row.stop_ids) for row in rows], device=device) if any(sets) else None,
            Draw.of([(row.sampling, row.seed, len(row.tokens)) for row in rows], vocabulary, device),
            max(position - row.begin for position, row in zip(positions, rows, strict=True)) + 1,
            min(row.max_tokens - len(row.tokens) for row in rows),
            any(row.entropies is not None for row in rows),
            [],
        )

    def advance(self, logits: Tensor) -> list[int]:
        """Draw from `logits` [n, V]; returns the rows whose segments end with the token drawn."""
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

    def flush(self, rows: Sequence[DecodingRow]) -> None:
        """Append the tokens of the steps since the last call to the `rows`."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        tokens, logprobs, *entropies = (torch.stack(values, 1).tolist() for values in zip(*steps, strict=True))
        for i, row in enumerate(rows):
            row.tokens += tokens[i]
            row.logprobs += logprobs[i]
            if row.entropies is not None:
                row.entropies += entropies[0][i]
