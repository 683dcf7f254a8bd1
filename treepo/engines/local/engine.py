"""The embedded engine: batched decoding of many branches of many trees on the very module that is trained.

Its unit is a *prefix* (`Prefix`), which a request continues by a *segment*. Requests that share key-values form a
*session* (`Session`): those of a tree here, those of a prompt in `treepo serve`.

Each segment is decoded as a *row* in one *slot* of the key-value cache. When it has ended, its key-values stay in its
session's store, under the segment's name. So a segment that follows any part of it recomputes none of its prefix: it
reads the prefix in pages together with other rows, or copies it into its slot. The last token of a prefix has no
key-value yet: it is the first input of each segment that follows. So a segment of m tokens after a prefix of N tokens
computes and stores positions N - 1 to N + m - 1, in m steps.

The parts: `RequestQueue` (who asks for what, in which order, in how much memory), `ExpectedCallers` (whom the next step
waits for), `DecodingLoop` (the steps), `Slots` and `Pages` (where key-values lie while they are read).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Hashable
from functools import partial

import torch
from transformers import PreTrainedModel

from treepo.engines import Sampling, Segment
from treepo.engines.local.batch import LocalStats
from treepo.engines.local.decoding import DecodingLoop
from treepo.engines.local.kv_store import KVStore, MemoryBudget
from treepo.engines.local.model_runner import Cache, Decode, Steps
from treepo.engines.local.prefix import Prefix, Span
from treepo.engines.local.request_queue import LocalRequest, RequestQueue, Session
from treepo.engines.local.shared_pages import Pages, page_names
from treepo.engines.local.slots import Slots
from treepo.engines.open_trees import require_no_tree, require_prompt_fits
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError, EngineError
from treepo.models import attention, causal_lm
from treepo.tree import ROOT, Tree


class LocalHandle:
    """The engine's view of one tree: its session, in which a node is a prefix."""

    def __init__(
        self,
        engine: LocalEngine,
        session: Session,
        tree: Tree,
        sampling: Sampling,
        stop_ids: frozenset[int],
        entropies: bool,
    ) -> None:
        self._engine, self._session, self.tree = engine, session, tree
        self.sampling, self.stop_ids, self.entropies = sampling, stop_ids, entropies

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """Continue the prefix that ends with `node`; see `Handle`. `seed` must name no other segment of the tree."""
        if seed in self._session.store.blocks and any(other.seed == seed for other in self.tree.nodes[1:]):
            raise ValueError(f"{self._session.label} has a segment of seed {seed} already")
        return await self._engine.generate(
            self._session,
            prefix_of(self.tree, node),
            max_tokens,
            name=seed,
            seed=seed,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            entropies=self.entropies,
        )

    def close(self) -> None:
        """Free the tree's key-values; requests under way are cancelled."""
        self._engine.close_session(self._session)


class LocalEngine:
    """Decodes on `model`, a causal LM from `treepo.models.causal_lm`, without a copy of its weights.

    `open` never waits. Of the open trees only those hold key-values whose segments have started, and deeper requests go
    first, so that trees finish before others begin. The cache grows with the rows and lengths in use, and is given back
    when no tree is open.

    Under `memory_gib` the cache has its full size at once, and the rest of the memory bounds what the trees keep
    (`MemoryBudget`): requests wait in the queue, and draw the same tokens later. Rows share what they read (`Pages`),
    but not under `memory_gib`, nor where steps are recorded, since a recorded step knows only slots.
    """

    granularity = 1
    plan = Decode  # of a step
    cache = Cache  # of the slots
    loop = DecodingLoop
    page = 64  # positions that rows read together: what they share is rounded down to a multiple of it

    def __init__(self, model: PreTrainedModel, settings: LocalSettings | None = None) -> None:
        if getattr(model.config, "_attn_implementation", None) != attention.NAME:
            raise ConfigError("engine: the model cannot be decoded yet: pass it through causal_lm.prepare first")
        self._model, self._settings = model, settings or LocalSettings()
        self.context = min(causal_lm.context(model), self._settings.max_tokens or 1 << 30)
        budget = None if self._settings.memory_gib is None else self._room(self._settings.memory_gib)
        self.tree_tokens = 1 << 60 if budget is None else budget.tokens
        self._queue = RequestQueue(budget)
        # Not a method of this object: it would be in a cycle, and its model in memory until Python looks for cycles.
        new_slots = partial(self._new_slots, model, self._settings, self.context)
        self._loop = self.loop(model, self._queue, self._settings.slots, new_slots)

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._loop.version

    @property
    def stats(self) -> LocalStats:
        """What was computed since the engine was made; assign a `LocalStats()` to count from zero again."""
        return self._loop.stats

    @stats.setter
    def stats(self, stats: LocalStats) -> None:
        self._loop.stats = stats

    @property
    def cached_tokens(self) -> int:
        """Tokens whose key-values are kept for the open sessions."""
        return sum(session.store.tokens for session in self._queue.sessions)

    async def start(self) -> None:
        """The model is here already."""

    async def open(
        self,
        tree: Tree,
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None = None,
        *,
        entropies: bool = False,
    ) -> LocalHandle:
        """A handle for `tree`; raises `EngineError` for a tree that there can be no room for.

        Under `memory_gib`, trees of unknown `max_tokens` are decoded one after the other. The handle's caller is
        expected to ask as soon as it can, and so again after every reply; see `ExpectedCallers`.
        """
        require_prompt_fits(tree, self.context, f"raise {self._limit()}")
        vocabulary = self._model.config.vocab_size
        if unknown := [i for i in stop_ids if not 0 <= i < vocabulary]:
            raise ConfigError(f"stop ids {unknown} are outside of the model's vocabulary of {vocabulary}")
        session = self.open_session(f"tree {tree.key!r}", max_tokens)
        return LocalHandle(self, session, tree, sampling, frozenset(stop_ids), entropies)

    def open_session(self, label: str, max_tokens: int | None = None, *, asks_again: bool = True) -> Session:
        """A session for prefixes with one prompt; raises `EngineError` if there can be no room for it.

        `label` is what messages call it. `max_tokens`: the most tokens that its prompt and segments will ever have,
        each counted once; None: not known. `asks_again=False`: decoding does not wait for its next request.
        """
        if max_tokens is not None and max_tokens > self.tree_tokens:
            raise EngineError(
                f"{label} may come to {max_tokens} tokens, and engine.memory_gib="
                f"{self._settings.memory_gib:g} has room for {self.tree_tokens} beside the slots: raise it, or lower "
                "engine.slots, engine.max_tokens, the width or the response budget"
            )
        session = Session(label, KVStore(self.tree_tokens if max_tokens is None else max_tokens), asks_again)
        self._loop.open(session)
        return session

    async def generate(
        self,
        session: Session,
        prefix: Prefix,
        max_tokens: int,
        *,
        name: Hashable,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        entropies: bool = False,
    ) -> Segment:
        """Continue `prefix` by 1 to `max_tokens` tokens, or until one of `stop_ids`.

        The reply is a function of the prefix, `max_tokens` and `seed` (to the last bits of floating point). Its
        key-values are kept in the session under `name`, which names no other segment there. Raises `EngineError` if
        there can be no room. Cancelling the call frees its slot.
        """
        if session.closed:
            raise RuntimeError(f"{session.label} is closed")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}: a segment has at least one token")
        if prefix.length + max_tokens > self.context:
            raise EngineError(
                f"{session.label}: {prefix.length} tokens of prefix and max_tokens={max_tokens} exceed {self.context}: "
                f"lower the response budget, or raise {self._limit()}"
            )
        request = LocalRequest(
            prefix=prefix,
            max_tokens=max_tokens,
            name=name,
            seed=seed,
            sampling=sampling,
            stop_ids=stop_ids,
            store=session.store,
            pages=page_names(session.store, prefix.spans, self.page),
            entropies=[] if entropies else None,
            session=session,
            future=asyncio.get_running_loop().create_future(),
        )
        self._loop.submit(request)
        try:
            return await request.future
        finally:
            self._loop.leave(request)

    def close_session(self, session: Session) -> None:
        """Free the session's key-values; requests under way are cancelled."""
        self._loop.close(session)

    async def load_weights(self, version: int) -> None:
        """The module has been updated: later segments carry `version`. All key-values are gone."""
        require_no_tree(len(self._queue.sessions))
        self._loop.version = version

    async def close(self) -> None:
        """Nothing is left to free: the last tree that closed has freed everything."""

    def _room(self, memory_gib: float) -> MemoryBudget:
        """What the trees may keep beside the slots."""
        with torch.no_grad():
            cache = self.cache(self._model, self._settings.slots, self.context)
        slots, length = cache.limits
        tokens = int(memory_gib * 2**30) // cache.token_bytes - slots * length
        if tokens < 1:
            raise ConfigError(
                f"engine.memory_gib={memory_gib:g}: {slots} slots of {length} tokens alone take "
                f"{slots * length * cache.token_bytes / 2**30:.3g}: raise it, or lower engine.slots or "
                "engine.max_tokens"
            )
        return MemoryBudget(tokens)

    def _limit(self) -> str:
        own = self._settings.max_tokens is not None and self._settings.max_tokens <= causal_lm.context(self._model)
        return "engine.max_tokens" if own else "the model's context (max_position_embeddings)"

    @classmethod
    def _new_slots(cls, model: PreTrainedModel, settings: LocalSettings, context: int) -> Slots[LocalRequest]:
        cache = cls.cache(model, settings.slots, context)
        graphs, bounded = settings.cuda_graphs and model.device.type == "cuda", settings.memory_gib is not None
        pages = None if graphs or bounded else Pages(cls.page, cache.layers())
        if bounded:
            cache.reserve(*cache.limits)
        return Slots(Steps(model, cache, cls.plan, graphs=graphs), pages)


def prefix_of(tree: Tree, node: int) -> Prefix:
    """The path to `node` as a prefix: each segment's key-values are called by its seed, and the prompt's None."""
    spans: list[Span] = []
    for index in tree.path(node):
        segment = tree.nodes[index]
        name = None if index == ROOT else segment.seed
        begin, end = max(segment.start - 1, 0), segment.start + len(segment.tokens) - 1
        if spans and spans[-1].name == name:
            spans[-1].end = end  # halves of one segment
        elif begin < end:
            spans.append(Span(name, begin, end))
    last = tree.nodes[node]
    return Prefix(last.start + len(last.tokens), last.tokens[-1], spans, lambda: tree.tokens(node), last.depth)
