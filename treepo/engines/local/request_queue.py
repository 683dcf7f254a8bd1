"""Who asks for segments, what is asked for, and which of the waiting requests may be decoded now."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from dataclasses import dataclass, field

from treepo.engines import Segment
from treepo.engines.local.batch import DecodingRow
from treepo.engines.local.kv_store import KVStore, MemoryBudget
from treepo.engines.local.shared_pages import PageName
from treepo.errors import EngineError


@dataclass(slots=True, eq=False)
class Session:
    """The requests that share one store of key-values: those of a tree, or those of a prompt that a server keeps."""

    label: str  # what messages call it
    store: KVStore
    asks_again: bool  # True: after its answers its caller asks again, or closes, as soon as it can
    unanswered: set[LocalRequest] = field(default_factory=set)
    closed: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class LocalRequest(DecodingRow):
    """A row, and who waits for it."""

    session: Session
    future: asyncio.Future[Segment]


class RequestQueue:
    """The open sessions and their requests.

    Of the waiting requests, the one with the highest priority goes first, and of equals the first to arrive. With a
    `budget` a request also waits until its session may keep its key-values; requests behind it may go before it.
    """

    def __init__(self, budget: MemoryBudget | None) -> None:
        self.sessions: list[Session] = []  # the oldest first
        self.live: dict[LocalRequest, None] = {}  # every request whose caller still waits, in the order of arrival
        self.wanted: Counter[PageName] = Counter()  # by how many of `live` a page could be read
        self._budget = budget
        self._waiting: list[tuple[int, int, LocalRequest]] = []  # a heap
        self._arrivals = 0

    def add(self, request: LocalRequest) -> None:
        """Raises `EngineError` if the session can never keep what its requests come to."""
        if self._budget is not None:
            self._require_room(request)
        self.live[request] = None
        self.wanted.update(request.pages)
        heapq.heappush(self._waiting, (-request.prefix.priority, self._arrivals, request))
        self._arrivals += 1

    def remove(self, request: LocalRequest) -> None:
        """The caller has its answer, or does not want it any more."""
        if request in self.live:
            del self.live[request]
            for page in request.pages:
                self.wanted[page] -= 1
                if not self.wanted[page]:
                    del self.wanted[page]
        request.store.settle(request.name)

    def take(self, room: int) -> list[LocalRequest]:
        """The next requests to decode, at most `room` of them, as far as their sessions may keep them."""
        taken: list[LocalRequest] = []
        held_back = []
        stores = [session.store for session in self.sessions]
        slack = self._budget.slack(stores) if self._budget is not None else {}
        while self._waiting and len(taken) < room:
            entry = heapq.heappop(self._waiting)
            request = entry[-1]
            if request.future.done():  # cancelled
                continue
            if self._budget is not None:
                wanted = request.store.wanted(request.prefix.spans, request.name, request.max_tokens)
                if sum(wanted.values()) > slack[request.store]:
                    held_back.append(entry)
                    continue
                request.store.held.update(wanted)
                slack = self._budget.slack(stores)
            taken.append(request)
        for entry in held_back:
            heapq.heappush(self._waiting, entry)
        return taken

    def stop_waiting(self) -> None:
        """Decode none of the waiting requests: all their sessions are closed."""
        self._waiting = []

    def forget(self) -> None:
        """Drop every request, but no session."""
        for request in self.live:
            request.session.unanswered.clear()
        self.live, self._waiting, self.wanted = {}, [], Counter()

    def _require_room(self, request: LocalRequest) -> None:
        store = request.store
        held = store.held.copy()
        for other in (*(other for other in self.live if other.session is request.session), request):
            held.update(store.wanted(other.prefix.spans, other.name, other.max_tokens))
        if (wanted := sum(held.values())) > store.limit:
            raise EngineError(
                f"{request.session.label} has room for the key-values of {store.limit} tokens, and its requests come "
                f"to {wanted}: open it with more max_tokens, or raise engine.memory_gib"
            )
