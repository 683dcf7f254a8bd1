"""Does an engine decode with the weights that are trained? The log-probs of a short segment show it.

This is for engines with weights of their own. An update that was ignored, half done, or answered from a stale cache
looks like success: no error appears, and the ratios of the loss are silently wrong.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from treepo.engines import Handle, Sampling, Segment
from treepo.engines.weight_files import WeightSource
from treepo.errors import EngineError
from treepo.models import causal_lm
from treepo.models.attention import Causal
from treepo.seeds import derive, generator
from treepo.tree import ROOT, Tree

# The temperature is not 1, so that the probe also finds a server which sends the log-probs before temperature.
SAMPLING = Sampling(temperature=0.7)
PROMPT, TOKENS = 24, 16
MOVED = 1e-3  # nats; weights in bfloat16 may round smaller updates away


@dataclass(frozen=True, slots=True)
class Probe:
    """A segment of an engine, with the log-probs of the engine and those of the model here."""

    tokens: list[int]
    logprobs: list[float]  # by the engine
    expected: list[float]  # by the model
    raw: list[float]  # by the model, before temperature

    @property
    def difference(self) -> float:
        """The largest difference between the engine's log-probs and the model's, in nats."""
        return _largest(self.logprobs, self.expected)

    def ignored_update(self, before: Probe | None) -> bool:
        """Whether the engine answers exactly as it did in `before`, although the model has changed since."""
        if before is None or (self.tokens, self.logprobs) != (before.tokens, before.logprobs):
            return False
        return _largest(self.expected, before.expected) > MOVED


def mismatch(found: Probe, before: Probe | None, tolerance: float) -> str | None:
    """What is wrong with an engine that answers as in `found`, with likely reasons; None: nothing is wrong.

    `before`: how it answered before weights were sent to it; None: no weights were sent. `tolerance` in nats.
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
    """A tree with the prompt of the probe: random token ids, the same ones every time."""
    rng = generator("probe")
    length = min(PROMPT, causal_lm.context(model) // 2)
    return Tree([rng.randrange(model.config.vocab_size) for _ in range(length)], key="probe")


async def probe(handle: Handle, tree: Tree, model: PreTrainedModel) -> Probe:
    """Ask an engine for a segment, and compare it with `model`.

    `tree` comes from `probe_tree`; `handle` is the engine's handle for it, with `SAMPLING` and no stop ids.
    """
    tokens = min(TOKENS, causal_lm.context(model) - len(tree.prompt))
    segment = await handle.generate(ROOT, tokens, derive("probe", 0))
    return compared(tree, segment, model)


def compared(tree: Tree, segment: Segment, model: PreTrainedModel) -> Probe:
    """The probe for `segment`, which follows the prompt of `tree`: `model` computes the log-probs of its tokens."""
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


class WeightGuard(ABC):
    """Makes sure that a decoder with weights of its own uses those of `source.model` before it gets a tree.

    A decoder is one server, or vLLM in this process. A subclass says in `_load` how the decoder gets the weights, and
    in `_probe_handle` how to ask it for a segment. The order of requests to the decoder is always the same: load if
    there was an update; probe; load and probe again if the decoder had other weights before any update.
    """

    def __init__(self, name: str, source: WeightSource, tolerance: float) -> None:
        self.name = name  # in error messages
        self.source = source
        self.holds: int | None = None  # the version that it was seen to decode with; None: not known
        self.probed: Probe | None = None  # the last one
        self._tolerance = tolerance  # nats
        self._making_ready = asyncio.Lock()

    @property
    def ready(self) -> bool:
        """Whether the decoder was seen to decode with the present version."""
        return self.holds == self.source.version

    async def make_ready(self) -> None:
        """See to it that the decoder uses the model's weights; raises `EngineError` if it does not.

        Before the first update a decoder is left as it is if its log-probs are right. So a server that cannot be
        updated can still be sampled from.
        """
        async with self._making_ready:
            if self.ready:
                return
            version = self.source.version
            sent, before = self._due(), None
            if sent:
                before = self.probed
                await self._load()
            found = await self._probe()
            if found.difference > self._tolerance and not sent and self._can_load():
                await self._load_first()
                found = await self._probe()
            why = mismatch(found, before, self._tolerance)
            if why and self._has_another_way(why):
                await self._load()
                why = mismatch(await self._probe(), before, self._tolerance)
            if why:
                raise EngineError(f"{self.name}, version {version} of the weights: {why}")
            self.holds = version

    @abstractmethod
    async def _load(self) -> None:
        """Have the decoder load the present weights; raises `EngineError` if it does not."""

    @abstractmethod
    def _probe_handle(self, tree: Tree) -> Handle:
        """A handle for the probe's `tree`, which works whatever weights the decoder has."""

    @abstractmethod
    def _due(self) -> bool:
        """Whether weights must be loaded before the decoder is probed, because there was an update."""

    def _can_load(self) -> bool:
        """Whether `_load_first` may be called."""
        return True

    async def _load_first(self) -> None:
        """Load the model's weights into a decoder that was found to have others before any update."""
        await self._load()

    def _has_another_way(self, why: str) -> bool:
        """Whether `_load` will use another way from now on, because the weights did not arrive (`why`)."""
        return False

    async def _probe(self) -> Probe:
        tree = probe_tree(self.source.model)
        self.probed = await probe(self._probe_handle(tree), tree, self.source.model)
        return self.probed


def _largest(one: Sequence[float], two: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))
