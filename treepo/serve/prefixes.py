"""What requests have in common: the prefixes of each prompt, whose key-values stay for later requests.

Requests are independent of each other and carry their whole prefix. So each request is looked up: it belongs to the
longest known prompt with which it begins, below the node with which it has most tokens in common. What is not known yet
joins the prefixes of that prompt, as does the reply.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from treepo.engines import Sampling, Segment
from treepo.engines.local.engine import LocalEngine
from treepo.engines.local.request_queue import Session
from treepo.serve.radix import RadixNode


@dataclass(slots=True, eq=False)
class KnownPrompt:
    """A prompt, what is known below it, and the engine's session with the key-values."""

    root: RadixNode
    session: Session
    tokens: int  # in the prompt and below, each counted once
    used: int = 0  # number of the last request that used it
    running: int = 0  # requests under way


@dataclass(frozen=True, slots=True)
class Answer:
    """A segment, and how much of its prefix was known already."""

    segment: Segment
    cached_tokens: int
    weights: str  # the name of the weights that sampled it


class NotLoadedError(Exception):
    """A request wants an adapter that is not loaded, or wants the base model while an adapter is loaded."""


class Prefixes:
    """Answers requests on `engine`, and keeps the key-values of at most `tokens` tokens between requests.

    The least recently used prompts are dropped first, with everything below them. A prompt with requests under way is
    kept even if there are too many tokens.
    """

    def __init__(self, engine: LocalEngine, tokens: int) -> None:
        self.engine, self.tokens = engine, tokens
        self.adapter: str | None = None  # the one that the model has; None: it has none
        self._base = "default"  # the name of the weights without adapter
        self.running = 0  # requests under way
        self.kept = 0  # tokens of all known prompts
        self._prompts: dict[tuple[int, ...], KnownPrompt] = {}  # by token ids
        self._lengths: Counter[int] = Counter()  # of the prompts
        self._clock, self._names = count(1), count(1)
        self._free, self._idle = asyncio.Event(), asyncio.Event()
        self._free.set()  # no update is under way
        self._idle.set()  # no request is under way
        self._updates = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def weights(self) -> str:
        """The name of the weights that are decoded with."""
        return self.adapter or self._base

    async def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        adapter: str | None = None,
    ) -> Answer:
        """Continue `ids`; raises `EngineError`, or `NotLoadedError`. Cancelling the call frees its slot."""
        while not self._free.is_set():
            await self._free.wait()
        if adapter != self.adapter:
            wanted = "The base model" if adapter is None else f"The model `{adapter}`"
            served = "without an adapter" if self.adapter is None else f"with the adapter `{self.adapter}` alone"
            raise NotLoadedError(f"{wanted} does not exist: what is served is the base model {served}.")
        self.running += 1
        self._idle.clear()
        try:
            prompt, node, known = self._place(ids)
            prompt.running += 1
            prompt.used = next(self._clock)
            name = next(self._names)
            try:
                segment = await self.engine.generate(
                    prompt.session,
                    node.prefix(),
                    max_tokens,
                    name=name,
                    seed=seed,
                    sampling=sampling,
                    stop_ids=stop_ids,
                )
                self._grow(prompt, node, segment.tokens, name)
                return Answer(segment, known, self.weights)
            finally:
                prompt.running -= 1
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()
            self._evict(self.tokens)

    def flush(self) -> None:
        """Forget every prompt without a request under way."""
        self._evict(0)

    async def update(self, weights: str | None, load: Callable[[], None], adapter: str | None = None) -> None:
        """Call `load`, which changes the weights, once all requests under way are answered; later ones wait for it.

        `weights`: the new name of the weights without adapter; None: it stays. `adapter`: the one that `load` puts in.
        """
        async with self._updates:
            self._free.clear()
            try:
                await self._idle.wait()
                self.flush()
                self.adapter = None  # also if `load` fails
                load()
                self._base, self.adapter = weights or self._base, adapter
                await self.engine.load_weights(self.engine.version + 1)
            finally:
                self._free.set()

    def _place(self, ids: Sequence[int]) -> tuple[KnownPrompt, RadixNode, int]:
        """The prompt of `ids`, the node with which they end there, and how many of them were known before."""
        key = next((p for n in sorted(self._lengths, reverse=True) if (p := tuple(ids[:n])) in self._prompts), None)
        if key is None:
            session = self.engine.open_session("the prompt", asks_again=False)
            prompt = KnownPrompt(RadixNode(None, list(ids), next(self._names), 0, 0), session, len(ids))
            self._prompts[tuple(ids)] = prompt
            self._lengths[len(ids)] += 1
            self.kept += len(ids)
            return prompt, prompt.root, 0
        prompt = self._prompts[key]
        node = prompt.root.longest(ids)
        known = node.end
        if known < len(ids):
            node = self._grow(prompt, node, ids[known:], next(self._names))
        return prompt, node, known

    def _grow(self, prompt: KnownPrompt, node: RadixNode, tokens: Sequence[int], name: int) -> RadixNode:
        prompt.tokens += len(tokens)
        self.kept += len(tokens)
        return node.add(tokens, name)

    def _evict(self, tokens: int) -> None:
        """Drop prompts without a request under way until at most `tokens` tokens are kept."""
        if self.kept <= tokens:
            return
        for key, prompt in sorted(self._prompts.items(), key=lambda item: item[1].used):
            if self.kept <= tokens:
                return
            if prompt.running:
                continue
            self.engine.close_session(prompt.session)
            del self._prompts[key]
            self._lengths[len(key)] -= 1
            if not self._lengths[len(key)]:
                del self._lengths[len(key)]
            self.kept -= prompt.tokens
