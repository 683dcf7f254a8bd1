"""Drawing tokens: one vectorised call for all rows, each a pure function of its logits, its seed and its place.

Each row has its own SplitMix64 stream (Steele, Lea and Flood, 2014), started at the seed of the segment. The stream is
a hash of a counter, so that token `t` of a segment gets the same number whichever rows are decoded beside it. One
number per token is enough: the token is the inverse of the cumulative distribution at that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treepo.engines import Sampling

GAMMA = 0x9E3779B97F4A7C15
BLOCK = 128  # tokens per partial sum of the distribution, so that only V / BLOCK numbers are needed in float64
# Tokens that top-p sorts at first if there is no top-k, and how many times more where their mass is not enough. With a
# vocabulary of 150,000, sorting 1024 takes 0.8 ms a row, 8192 take 2 ms, and all take 15 ms: more than a small model.
NUCLEUS, WIDER = 1024, 8


@dataclass(slots=True)
class Draw:
    """How the n rows of a batch draw their next token. Calling it moves every row to its next random number."""

    state: Tensor  # [n] int64: counters of the streams
    temperature: Tensor | None  # [n, 1] float32; None: all are 1
    greedy: Tensor | None  # [n] bool; None: none is
    filtered: Tensor | None  # [f] int64: the rows with top-k or top-p; None: there are none
    top_k: Tensor  # [f, 1] int64
    top_p: Tensor  # [f, 1] float32
    width: int  # tokens to sort: all that top-k may keep, and most likely all that top-p keeps

    @classmethod
    def of(cls, rows: Sequence[tuple[Sampling, int, int]], vocabulary: int, device: torch.device) -> Draw:
        """`rows` hold the sampling, the seed and how many tokens of the segment have been drawn already."""
        temperature = [sampling.temperature for sampling, _, _ in rows]
        filters = {
            row: (min(sampling.top_k or vocabulary, vocabulary), sampling.top_p)
            for row, (sampling, _, _) in enumerate(rows)
            if sampling.temperature > 0 and (0 < sampling.top_k < vocabulary or sampling.top_p < 1)
        }
        return cls(
            torch.tensor([_signed(seed + made * GAMMA) for _, seed, made in rows], device=device),
            torch.tensor([[t or 1.0] for t in temperature], device=device) if set(temperature) - {0.0, 1.0} else None,
            torch.tensor([t == 0 for t in temperature], device=device) if 0.0 in temperature else None,
            torch.tensor(list(filters), device=device) if filters else None,
            torch.tensor([[k] for k, _ in filters.values()], device=device),
            # Rounding may bring a running sum to 1 before the last token: infinity instead of 1 keeps all.
            torch.tensor([[p if p < 1 else torch.inf] for _, p in filters.values()], device=device),
            max((k if k < vocabulary else min(NUCLEUS, vocabulary) for k, _ in filters.values()), default=0),
        )

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n] drawn from `logits` [n, V], and their log-probs [n] float32 under the distribution sampled.

        That distribution is the model's after temperature, then top-k, then top-p, each renormalised. A greedy row
        samples from a point mass: its log-probs are 0.
        """
        self.state += _signed(GAMMA)
        logits = logits.float()
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.filtered is not None:
            kept = _filter(logits[self.filtered], self.top_k, self.top_p, self.width)
            logits = logits.index_copy(0, self.filtered, kept)
        logits = logits - logits.amax(-1, keepdim=True)
        tokens, total = invert(logits.exp(), uniform(self.state))
        drawn = (logits.gather(1, tokens[:, None])[:, 0].double() - total.log()).float()
        if self.greedy is not None:
            tokens = torch.where(self.greedy, logits.argmax(-1), tokens)
            drawn = drawn.masked_fill(self.greedy, 0.0)
        return tokens, drawn

    def entropies(self, logits: Tensor) -> Tensor:
        """Entropies [n] in nats of the distributions of `logits` [n, V] after temperature, before top-k and top-p.

        For a greedy row it is the entropy of the logits as they are.
        """
        logits = logits.float()
        if self.temperature is not None:
            logits = logits / self.temperature
        found: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
        return found


def uniform(state: Tensor) -> Tensor:
    """SplitMix64's output for the counters `state` [n] int64, as [n] float64 multiples of 2^-53 in [0, 1)."""
    z = state
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)  # int64 products wrap: arithmetic modulo 2^64
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def invert(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token [n] at which the running sum of `p` [n, V] first exceeds the share `u` [n] < 1 of its total [n].

    Such a token has p > 0, since the running sum rises there. The running sum over blocks and the one inside a block
    are float64. A block's own sum is float32, which moves the edges of blocks by 1e-7 of their mass.
    """
    blocks = F.pad(p, (0, -p.shape[1] % BLOCK)).view(len(p), -1, BLOCK)  # [n, V / BLOCK, BLOCK]
    edges = F.pad(blocks.sum(-1).double().cumsum(-1), (1, 0))  # [n, V / BLOCK + 1]
    target = u[:, None] * edges[:, -1:]  # [n, 1]; less than the total, because u <= 1 - 2^-53
    block = (edges[:, 1:] <= target).sum(-1, keepdim=True)  # [n, 1]
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)  # [n, BLOCK]
    # The block was summed in another order, so its sum may be smaller than its two edges say, in the last bits.
    last = inside[:, -1:]
    rest = torch.minimum(target - edges.gather(1, block), torch.nextafter(last, torch.zeros_like(last)))
    place: Tensor = (inside <= rest).sum(-1)  # [n]
    return block[:, 0] * BLOCK + place, edges[:, -1]


def _filter(logits: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """`logits` [f, V], minus infinity where top-k or top-p excludes the token; the most probable one stays.

    `width` tokens of each row [f] are sorted, and more of those rows whose nucleus is larger.
    """
    best, order = logits.topk(width, dim=-1)  # [f, width], descending
    best = best.masked_fill(torch.arange(width, device=best.device) >= top_k, -torch.inf)
    # Top-k renormalises over the tokens that it keeps; without top-k a token has a share of the whole.
    whole = top_k > width  # [f, 1]
    total = torch.where(whole, logits.logsumexp(-1, keepdim=True), best.logsumexp(-1, keepdim=True))
    share = (best - total).exp()
    sums = share.cumsum(-1)
    best = best.masked_fill(sums - share >= top_p, -torch.inf)
    kept = torch.full_like(logits, -torch.inf).scatter(1, order, best)
    if width < logits.shape[1]:
        more = (whole & (sums[:, -1:] < top_p))[:, 0].nonzero()[:, 0]
        if len(more):
            wider = min(WIDER * width, logits.shape[1])
            kept[more] = _filter(logits[more], top_k[more], top_p[more], wider)
    return kept


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64: torch's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """`value` modulo 2^64 as an int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
