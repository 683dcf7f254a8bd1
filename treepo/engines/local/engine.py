"""The embedded engine: batched decoding of many branches of many trees on the very module that is trained.

A *row* is a segment being decoded in one *slot* of the key-value cache. A segment that has ended leaves its key-values
with its tree, under its seed, so that a child of any node, wherever the tree was cut since, recomputes none of its
prefix: it reads that in pages together with other rows, or copies it into its slot. The last token of a prefix has no
key-value yet: it is the first input of each child. So the segment of m tokens after a prefix of N computes, and stores,
positions N - 1 to N + m - 1, in m steps.

One task of the caller's event loop decodes as long as there are requests. No thread, no clock: which rows share a
step depends on the order of the requests alone, and what a row draws does not even depend on that.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from treepo.engines import Sampling, Segment
from treepo.engines.local.batch import Batch, Row, Stats
from treepo.engines.local.model_runner import Cache, Decode, Steps, evaluating, out_of_memory, prefill
from treepo.engines.local.shared_pages import Name, Pages, names
from treepo.engines.local.slots import Slots
from treepo.engines.local.tree_cache import Block, Budget, Kept
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError, EngineError
from treepo.models import attention, causal_lm
from treepo.tree import Tree

# Turns of the event loop after a segment has ended: its caller wakes, a gather above it, and what that submits.
TURNS = 6


@dataclass(slots=True, eq=False, kw_only=True)
class _Request(Row):
    """One call of `generate`."""

    handle: LocalHandle
    node: int
    future: asyncio.Future[Segment]


class LocalHandle:
    """The engine's view of one tree: the key-values of its prompt and of every segment that has ended."""

    def __init__(
        self,
        engine: LocalEngine,
        tree: Tree,
        sampling: Sampling,
        stop_ids: frozenset[int],
        max_tokens: int,
        entropies: bool,
    ) -> None:
        self._engine, self.tree, self.sampling, self.stop_ids = engine, tree, sampling, stop_ids
        self.entropies = entropies
        self.kept = Kept(tree, max_tokens)

    async def generate(
        self,
        node: int,
        max_tokens: int,
        seed: int,
        *,
        name: int | None = None,
        sampling: Sampling | None = None,
        stop_ids: frozenset[int] | None = None,
    ) -> Segment:
        """Continue the prefix that ends with `node`; see `Handle`. `seed` must name no other segment of the tree.

        `name`: the segment's name where it is not `seed`, which then may be used again. `sampling` and `stop_ids`: its
        own in place of the tree's.
        """
        row = self._engine._submit(
            self,
            node,
            max_tokens,
            seed if name is None else name,
            seed,
            self.sampling if sampling is None else sampling,
            self.stop_ids if stop_ids is None else stop_ids,
        )
        try:
            return await row.future
        finally:
            self._engine._leave(row)

    def close(self) -> None:
        """Free the tree's key-values; requests under way are cancelled."""
        self._engine._close(self)


class LocalEngine:
    """Decodes on `model`, a causal LM from `treepo.models.causal_lm`, without a copy of its weights.

    `open` never waits: of the open trees only those hold key-values whose segments have started, and deeper requests
    go first, so that trees finish before others begin. The cache grows with the rows and lengths in use, and is given
    back when no tree is open. Under `memory_gib` it has its full size at once, and what is left bounds what the trees
    keep (`Budget`): requests wait in the queue, and draw the same tokens later. Rows share what they read (`Pages`),
    but not under `memory_gib`, nor where steps are recorded: a recorded step knows only slots.
    """

    granularity = 1
    plan = Decode  # of a step
    cache = Cache  # of the slots
    page = 64  # positions that rows read together: what they share is rounded down to a multiple of it

    def __init__(self, model: PreTrainedModel, settings: LocalSettings | None = None) -> None:
        if getattr(model.config, "_attn_implementation", None) != attention.NAME:
            raise ConfigError("engine: the model cannot be decoded yet: pass it through causal_lm.prepare first")
        self._model, self._settings = model, settings or LocalSettings()
        self.context = min(causal_lm.context(model), self._settings.max_tokens or 1 << 30)
        self.version = 0
        self.stats = Stats()
        self._budget = None if self._settings.memory_gib is None else self._room(self._settings.memory_gib)
        self.tree_tokens = 1 << 60 if self._budget is None else self._budget.tokens
        self._handles: list[LocalHandle] = []  # of the open trees, the oldest first
        self._live: dict[_Request, None] = {}  # every row with somebody waiting for it, in order of arrival
        self._queue: list[tuple[int, int, _Request]] = []  # a heap: the deepest first, then the first to arrive
        self._arrivals = 0
        self._wanted: Counter[Name] = Counter()  # by how many of `_live` a page could be read
        self._changed = False  # some row is done, or waits
        self._batch: Batch | None = None  # of `_rows`
        self._slots: Slots[_Request] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def _rows(self) -> list[_Request]:
        """By slot; one that is done leaves its slot at the next `_admit`."""
        return self._slots.rows if self._slots is not None else []

    @property
    def cached_tokens(self) -> int:
        """Tokens whose key-values are kept for the open trees."""
        return sum(block.tokens for handle in self._handles for block in handle.kept.blocks.values())

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

        Under `memory_gib`, trees of unknown `max_tokens` are decoded one after the other.
        """
        if len(tree.prompt) >= self.context:
            raise EngineError(
                f"the prompt of tree {tree.key!r} has {len(tree.prompt)} tokens, and prompt and response share "
                f"{self.context}: drop the problem, or raise {self._limit()}"
            )
        vocabulary = self._model.config.vocab_size
        if unknown := [i for i in stop_ids if not 0 <= i < vocabulary]:
            raise ConfigError(f"stop ids {unknown} are outside of the model's vocabulary of {vocabulary}")
        if max_tokens is not None and max_tokens > self.tree_tokens:
            raise EngineError(
                f"tree {tree.key!r} may come to {max_tokens} tokens, and engine.memory_gib="
                f"{self._settings.memory_gib:g} has room for {self.tree_tokens} beside the slots: raise it, or lower "
                "engine.slots, engine.max_tokens, the width or the response budget"
            )
        most = self.tree_tokens if max_tokens is None else max_tokens
        self._handles.append(LocalHandle(self, tree, sampling, frozenset(stop_ids), most, entropies))
        return self._handles[-1]

    async def load_weights(self, version: int) -> None:
        """The module has been updated: later segments carry `version`. All key-values are gone."""
        if self._handles:
            raise RuntimeError(f"{len(self._handles)} trees are open: close them before the weights change")
        self.version = version

    async def close(self) -> None:
        """The last tree that closed has freed all there was."""

    def _room(self, memory_gib: float) -> Budget:
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
        return Budget(tokens)

    def _limit(self) -> str:
        own = self._settings.max_tokens is not None and self._settings.max_tokens <= causal_lm.context(self._model)
        return "engine.max_tokens" if own else "the model's context (max_position_embeddings)"

    def _submit(
        self,
        handle: LocalHandle,
        node: int,
        max_tokens: int,
        name: int,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
    ) -> _Request:
        tree = handle.tree
        end = tree.nodes[node]
        prefix = end.start + len(end.tokens)
        if handle not in self._handles:
            raise RuntimeError(f"tree {tree.key!r} is closed")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}: a segment has at least one token")
        if prefix + max_tokens > self.context:
            raise EngineError(
                f"tree {tree.key!r}: {prefix} tokens of prefix and max_tokens={max_tokens} exceed {self.context}: "
                f"lower the response budget, or raise {self._limit()}"
            )
        if name in handle.kept.blocks and any(other.seed == name for other in tree.nodes[1:]):
            raise ValueError(f"tree {tree.key!r} has a segment of seed {name} already")
        loop = asyncio.get_running_loop()
        if self._task is not None and self._task.get_loop() is not loop:
            self._abandon()  # a loop that ended without cancelling its tasks
        spans = handle.kept.spans(node)
        row = _Request(
            prefix=prefix,
            last=end.tokens[-1],
            max_tokens=max_tokens,
            seed=name,
            draws=seed,
            sampling=sampling,
            stop_ids=stop_ids,
            kept=handle.kept,
            spans=spans,
            pages=names(handle.kept, spans, self.page),
            entropies=[] if handle.entropies else None,
            handle=handle,
            node=node,
            future=loop.create_future(),
        )
        if self._budget is not None:
            self._require_room(row)
        self._live[row] = None
        self._wanted.update(row.pages)
        heapq.heappush(self._queue, (-end.depth, self._arrivals, row))
        self._arrivals += 1
        self._wake()
        return row

    def _require_room(self, row: _Request) -> None:
        kept = row.kept
        held = kept.held.copy()
        for other in (*(other for other in self._live if other.handle is row.handle), row):
            held.update(kept.wanted(other.spans, other.seed, other.max_tokens))
        if (wanted := sum(held.values())) > kept.most:
            raise EngineError(
                f"tree {row.handle.tree.key!r} has room for the key-values of {kept.most} tokens, and its requests "
                f"come to {wanted}: open it with more max_tokens, or raise engine.memory_gib"
            )

    def _wake(self) -> None:
        self._changed = True
        if self._task is None and self._live:
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._ended)

    def _leave(self, row: _Request) -> None:
        if row in self._live:
            del self._live[row]
            for name in row.pages:
                self._wanted[name] -= 1
                if not self._wanted[name]:
                    del self._wanted[name]
        row.kept.settle(row.seed)
        self._changed = True

    def _close(self, handle: LocalHandle) -> None:
        if handle not in self._handles:
            return
        self._handles.remove(handle)
        handle.kept.blocks.clear()
        for row in self._live:
            if row.handle is handle:
                row.future.cancel()
        if not self._handles:
            self._queue, self._batch, self._slots = [], None, None
            # Whatever is opened next starts as in a new engine: which rows share a step does not hang on the past.
            if self._task is not None and not self._live:
                task, self._task = self._task, None
                task.cancel()
        self._wake()

    def _abandon(self) -> None:
        """Forget every request, but no tree."""
        self._live, self._queue, self._wanted = {}, [], Counter()
        self._batch, self._slots, self._task = None, None, None

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Whatever ended the decoding task reaches everyone who waits for it."""
        if task is not self._task:
            return
        error = None if task.cancelled() else task.exception()
        waiting = [row.future for row in self._live if not row.future.done()]
        self._abandon()
        for future in waiting:
            if error is None:
                future.cancel()
            else:
                future.set_exception(error)

    async def _run(self) -> None:
        """Decode until no request is left, or each waits for memory that the owner of a tree holds."""
        turns = TURNS
        modules = list(self._model.modules())
        while True:
            for _ in range(turns):
                await asyncio.sleep(0)
            with evaluating(modules), out_of_memory(self._settings.slots):
                self._admit()
                if not self._rows:
                    break
                turns = TURNS if self._step() else 1
        self._task = None

    def _admit(self) -> None:
        """Free the slots of rows that are done, give them to waiting rows, and close the gaps."""
        if not self._changed:
            return
        self._changed = False
        free = [slot for slot, row in enumerate(self._rows) if row.future.done()]
        joining = self._joining(self._settings.slots - len(self._rows) + len(free))
        if not free and not joining:
            return
        if self._batch is not None:
            self._batch.flush(self._rows)
        self._prefill(joining)
        copied, continued = self._decoder().change(free, joining, self._wanted)
        self.stats.copied_tokens += copied
        self.stats.continued_tokens += continued
        self._batch = None

    def _joining(self, room: int) -> list[_Request]:
        """Waiting rows for `room` slots, the deepest first, as far as their trees may keep them."""
        joining: list[_Request] = []
        waiting = []
        trees = [handle.kept for handle in self._handles]
        slack = self._budget.slack(trees) if self._budget is not None else {}
        while self._queue and len(joining) < room:
            entry = heapq.heappop(self._queue)
            row = entry[-1]
            if row.future.done():  # cancelled
                continue
            if self._budget is not None:
                wanted = row.kept.wanted(row.spans, row.seed, row.max_tokens)
                if sum(wanted.values()) > slack[row.kept]:
                    waiting.append(entry)
                    continue
                row.kept.held.update(wanted)
                slack = self._budget.slack(trees)
            joining.append(row)
        for entry in waiting:
            heapq.heappush(self._queue, entry)
        return joining

    def _decoder(self) -> Slots[_Request]:
        if self._slots is None:
            cache = self.cache(self._model, self._settings.slots, self.context)
            graphs = self._settings.cuda_graphs and self._model.device.type == "cuda"
            pages = None if graphs or self._budget is not None else Pages(self.page, cache.layers())
            if self._budget is not None:
                cache.reserve(*cache.limits)
            self._slots = Slots(Steps(self._model, cache, self.plan, graphs=graphs), pages)
        return self._slots

    def _prefill(self, rows: Sequence[_Request]) -> None:
        """Compute the key-values that the trees of `rows` lack, each once."""
        lacking = {(row.kept, row.spans[-1].seed, row.prefix): row for row in rows if row.kept.missing(row.spans)}
        prefixes = [row.handle.tree.tokens(row.node)[:-1] for row in lacking.values()]
        for row, kv in zip(lacking.values(), prefill(self._model, prefixes), strict=True):
            for span in row.kept.missing(row.spans):
                row.kept.blocks[span.seed] = Block(span.begin, kv[:, :, :, span.begin : span.end].clone())
            self.stats.prefilled_tokens += row.prefix - 1

    def _step(self) -> bool:
        """Decode one token in every row; whether some segment has ended."""
        if self._batch is None:
            self._batch = Batch.of(self._rows, self._model)
        slots, batch = self._decoder(), self._batch
        ended = batch.advance(slots.logits(batch))
        self.stats.steps += 1
        self.stats.decoded_tokens += len(self._rows)
        if ended:
            batch.flush(self._rows)
        for slot in ended:
            self._finish(slot, slots)
        return bool(ended)

    def _finish(self, slot: int, slots: Slots[_Request]) -> None:
        """Keep the key-values of the segment that has ended in `slot`, and answer its caller."""
        row = slots.rows[slot]
        self._changed = True
        if row.future.done():  # cancelled
            return
        if not math.isfinite(sum(row.logprobs)):
            row.future.set_exception(EngineError("the model's logits are not finite: did the last update diverge?"))
            return
        slots.keep(slot)
        row.future.set_result(Segment(row.tokens, row.logprobs, self.version, row.entropies))
