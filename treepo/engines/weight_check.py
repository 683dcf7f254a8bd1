"""Does an engine decode with the weights that are trained? Its log-probs of a short segment say so.

For any engine whose weights are not the trained module itself: an update that was ignored, half done, or answered from
a stale cache looks like success until the ratios of the loss go wrong, silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from treepo.engines import Handle, Sampling, Segment
from treepo.models import causal_lm
from treepo.models.attention import Causal
from treepo.seeds import derive, generator
from treepo.tree import ROOT, Tree

# Not 1: so that a server which sends the log-probs before temperature is found, too.
SAMPLING = Sampling(temperature=0.7)
PROMPT, TOKENS = 24, 16
MOVED = 1e-3  # nats: bfloat16 weights may round smaller updates away


@dataclass(frozen=True, slots=True)
class Probe:
    """An engine's segment, and what the model here says of it."""

    tokens: list[int]
    logprobs: list[float]  # by the engine
    expected: list[float]  # by the model
    raw: list[float]  # by the model, before temperature

    @property
    def difference(self) -> float:
        """The largest one between the two, in nats."""
        return _largest(self.logprobs, self.expected)

    def ignored_update(self, before: Probe | None) -> bool:
        """Whether the engine answers to the bit as `before`, although the model has moved since."""
        if before is None or (self.tokens, self.logprobs) != (before.tokens, before.logprobs):
            return False
        return _largest(self.expected, before.expected) > MOVED


def mismatch(found: Probe, before: Probe | None, tolerance: float) -> str | None:
    """What is wrong with an engine that answers as `found`, and likely reasons; None: nothing.

    `before`: how it answered before weights were sent to it, if they were. `tolerance` in nats.
    """
    if found.ignored_update(before):
        return "it answers as before, although the model has moved: it ignored the update, or kept a stale prefix cache"
    if found.difference <= tolerance:
        return None
    if _largest(found.logprobs, found.raw) <= tolerance:
        return (
            "its log-probs are those before temperature, not of what it samples from: start vLLM with --logprobs-mode "
            "processed_logprobs, and SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
        )
    return (
        f"log-probs of a probe differ by up to {found.difference:.3g} nats from the model's, above engine.tolerance "
        f"({tolerance:g}). Likely reasons: it serves another model; it ignored an update or kept a stale prefix cache; "
        "or it computes in lower precision, which engine.tolerance must allow for"
    )


def probe_tree(model: PreTrainedModel) -> Tree:
    """The prompt of a probe: random token ids, always the same."""
    rng = generator("probe")
    length = min(PROMPT, causal_lm.context(model) // 2)
    return Tree([rng.randrange(model.config.vocab_size) for _ in range(length)], key="probe")


async def probe(handle: Handle, tree: Tree, model: PreTrainedModel) -> Probe:
    """Ask an engine for a segment of `tree` (of `probe_tree`, opened with `SAMPLING` and no stop ids)."""
    tokens = min(TOKENS, causal_lm.context(model) - len(tree.prompt))
    segment = await handle.generate(ROOT, tokens, derive("probe", 0))
    return compared(tree, segment, model)


def compared(tree: Tree, segment: Segment, model: PreTrainedModel) -> Probe:
    """`segment`, which follows the prompt of `tree`, with the log-probs that `model` gives its tokens."""
    ids = torch.tensor([*tree.prompt, *segment.tokens], device=model.device)
    positions = torch.arange(len(ids), device=model.device)
    first = len(tree.prompt)
    with torch.no_grad():
        states = causal_lm.hidden(model, ids[None], positions[None], Causal())[0, first - 1 : -1]
        expected, raw = (
            causal_lm.token_logprobs(model, states, ids[first:], temperature=temperature)[0].tolist()
            for temperature in (SAMPLING.temperature, 1.0)
        )
    return Probe(segment.tokens, segment.logprobs, expected, raw)


def _largest(one: Sequence[float], two: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))
