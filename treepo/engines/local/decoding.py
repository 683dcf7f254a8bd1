"""The loop that decodes: one task of the caller's event loop, which lives as long as there are requests.

There is no thread and no clock. Which rows share a step depends on the order of the requests alone, and what a row
draws does not even depend on that.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from treepo.engines import Segment
from treepo.engines.local.batch import Batch, LocalStats
from treepo.engines.local.callers import ExpectedCallers
from treepo.engines.local.kv_store import KVBlock
from treepo.engines.local.model_runner import evaluating, out_of_memory, prefill
from treepo.engines.local.request_queue import LocalRequest, RequestQueue, Session
from treepo.engines.local.slots import Slots
from treepo.errors import EngineError


class DecodingLoop:
    """Moves requests from the queue to the slots, decodes a token in every slot per step, and answers callers."""

    def __init__(
        self, model: PreTrainedModel, queue: RequestQueue, size: int, new_slots: Callable[[], Slots[LocalRequest]]
    ) -> None:
        """`size`: the number of slots. `new_slots` makes them; that happens again after the last session has closed."""
        self.queue = queue
        self.expected = ExpectedCallers()
        self.version = 0  # of the weights
        self.stats = LocalStats()
        self.slots: Slots[LocalRequest] | None = None  # None: nothing is decoded
        self._model, self._size, self._new_slots = model, size, new_slots
        self._batch: Batch | None = None  # of `rows`; None: they have changed
        self._changed = False  # some row is done, or waits
        self._task: asyncio.Task[None] | None = None

    @property
    def rows(self) -> list[LocalRequest]:
        """By slot; a row that is done leaves its slot at the next `_admit`."""
        return self.slots.rows if self.slots is not None else []

    def open(self, session: Session) -> None:
        """Take requests of `session` from now on."""
        self.queue.sessions.append(session)
        self.expected.expect(session)

    def submit(self, request: LocalRequest) -> None:
        """Decode `request`, as soon as it is its turn, and set its future; raises as `RequestQueue.add` does."""
        if self._task is not None and self._task.get_loop() is not asyncio.get_running_loop():
            self._abandon()  # its loop has ended without cancelling its tasks
        self.queue.add(request)
        request.session.unanswered.add(request)
        self.expected.heard_from(request.session)
        request.future.add_done_callback(lambda _: self._answered(request))
        self._wake()

    def leave(self, request: LocalRequest) -> None:
        """The caller of `request` has its answer, or does not want it any more."""
        self.queue.remove(request)
        self._wake()  # others may have waited for its memory

    def close(self, session: Session) -> None:
        """Cancel the requests of `session` and free its key-values."""
        if session.closed:
            return
        session.closed = True
        self.queue.sessions.remove(session)
        self.expected.heard_from(session)
        session.store.blocks.clear()
        for request in self.queue.live:
            if request.session is session:
                request.future.cancel()
        if not self.queue.sessions:
            self.queue.stop_waiting()
            self.slots, self._batch = None, None
            # The next session starts as in a new engine: which rows share a step does not depend on the past.
            if self._task is not None and not self.queue.live:
                task, self._task = self._task, None
                task.cancel()
        self._wake()

    def step(self) -> None:
        """Decode one token in every row, and answer those whose segments have ended."""
        slots = self._slots()
        if self._batch is None:
            self._batch = Batch.of(slots.rows, self._model)
        batch = self._batch
        ended = batch.advance(slots.logits(batch))
        self.stats.steps += 1
        self.stats.decoded_tokens += len(slots.rows)
        if ended:
            batch.flush(slots.rows)
        for slot in ended:
            self._finish(slot, slots)

    def _wake(self) -> None:
        self._changed = True
        if self._task is not None or not self.queue.live:
            return
        loop = next(reversed(self.queue.live)).future.get_loop()
        if loop.is_running():  # not where a loop has died and Python tidies up its coroutines
            self._task = loop.create_task(self._run())
            self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        """Decode until no request is left, or each waits for memory that an older session holds."""
        modules = list(self._model.modules())
        while True:
            await self.expected.wait()
            with evaluating(modules), out_of_memory(self._size):
                self._admit()
                if not self.rows:
                    break
                self.step()
        self._task = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        """If the task has failed or was cancelled, tell everyone who still waits."""
        if task is not self._task:
            return
        error = None if task.cancelled() else task.exception()
        waiting = [request.future for request in self.queue.live if not request.future.done()]
        self._abandon()
        for future in waiting:
            if error is None:
                future.cancel()
            else:
                future.set_exception(error)

    def _abandon(self) -> None:
        """Forget every request, but no session."""
        self.queue.forget()
        self._batch, self.slots, self._task = None, None, None

    def _answered(self, request: LocalRequest) -> None:
        """`request` is done: answered, failed or cancelled. This runs before its caller does."""
        unanswered = request.session.unanswered
        unanswered.discard(request)
        if not unanswered:
            self.expected.expect(request.session)

    def _admit(self) -> None:
        """Free the slots of rows that are done, give them to waiting rows, and close the gaps."""
        if not self._changed:
            return
        self._changed = False
        free = [slot for slot, row in enumerate(self.rows) if row.future.done()]
        joining = self.queue.take(self._size - len(self.rows) + len(free))
        if not free and not joining:
            return
        if self._batch is not None:
            self._batch.flush(self.rows)
        self._prefill(joining)
        copied, continued = self._slots().change(free, joining, self.queue.wanted)
        self.stats.copied_tokens += copied
        self.stats.continued_tokens += continued
        self._batch = None

    def _slots(self) -> Slots[LocalRequest]:
        if self.slots is None:
            self.slots = self._new_slots()
        return self.slots

    def _prefill(self, rows: Sequence[LocalRequest]) -> None:
        """Compute the key-values that the stores of `rows` lack, each once."""
        lacking = {
            (row.store, row.prefix.spans[-1].name, row.prefix.length): row
            for row in rows
            if row.store.missing(row.prefix.spans)
        }
        prefixes = [row.prefix.tokens()[:-1] for row in lacking.values()]
        for row, kv in zip(lacking.values(), prefill(self._model, prefixes), strict=True):
            for span in row.store.missing(row.prefix.spans):
                row.store.blocks[span.name] = KVBlock(span.begin, kv[:, :, :, span.begin : span.end].clone())
            self.stats.prefilled_tokens += row.prefix.length - 1

    def _finish(self, slot: int, slots: Slots[LocalRequest]) -> None:
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
