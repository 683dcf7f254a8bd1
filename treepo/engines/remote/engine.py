"""An engine over HTTP: trees are spread over inference servers. Each tree stays at one, which has its prefix cached.

A request carries its whole prefix. So a tree whose server dies goes on at another server, and nothing is lost. A server
gets no tree before it was seen to decode with the right weights (`engines.weight_check`): at first, after every update,
when it is reached again after its death, and after every broken connection, because it may have been started anew.

Three layers deal with failures: a `Replica` sends a request again; this module moves trees; the sampler turns an
`EngineError`, which is what remains, into a failed leaf.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedModel

from treepo.engines import Sampling, Segment
from treepo.engines.open_trees import OpenTrees
from treepo.engines.remote.protocols import SegmentRequest, checked, require_answerable
from treepo.engines.remote.replica import BrokenError, DeadError, Replica
from treepo.engines.settings import ServerSettings
from treepo.engines.weight_files import WeightSource
from treepo.errors import EngineError
from treepo.models import causal_lm
from treepo.tree import Tree

log = logging.getLogger(__name__)


class ServerHandle:
    """One tree of a `ServerEngine`."""

    def __init__(self, engine: ServerEngine, tree: Tree, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._engine, self.tree, self.sampling, self.stop_ids = engine, tree, sampling, stop_ids
        self.replica: Replica | None = None  # the server that has the tree; None: not chosen yet

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """Continue the prefix that ends with `node`; see `Handle`."""
        request = SegmentRequest.of(self, node, max_tokens, seed, self._engine.context)
        why = ""
        for _ in range(len(self._engine._replicas) + self._engine._settings.retries + 1):
            replica = await self._engine._replica_of(self)
            try:
                reply = await replica.generate(request)
            except (DeadError, BrokenError) as error:
                why = f"{replica.url}: {error}"
                if isinstance(error, DeadError):
                    self._engine._mark_dead(replica, str(error))
                continue
            if reply.weights == replica.label:
                return Segment(*checked(request, reply), self._engine.version)
            why = f"{replica.url} has the weights {reply.weights}, not {replica.label}: does another run use it?"
            replica.holds = None  # it was restarted, or somebody else has sent it weights
        raise EngineError(f"a request failed again and again; the last time: {why}")

    def close(self) -> None:
        """The server's cache forgets the tree by itself."""
        self._engine._forget(self)


class ServerEngine:
    """Asks the servers of `settings` for segments, and sends them the weights of `model` through `folder`.

    `sends`: whether this process sends weights; of several processes that share the servers, one does.
    """

    def __init__(
        self, model: PreTrainedModel, settings: ServerSettings, folder: str | Path, *, sends: bool = True
    ) -> None:
        self._settings = settings
        self._source = WeightSource(model, folder, writes=sends)
        self._replicas = [Replica(url, settings, self._source) for url in settings.urls]
        self._open = OpenTrees[ServerHandle]()
        self._revivals: dict[Replica, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting, self._started = asyncio.Lock(), False
        self.context = causal_lm.context(model)
        self.tree_tokens = 1 << 60
        self.granularity = settings.block_tokens or 1

    @property
    def version(self) -> int:
        """The version of the weights that segments come from."""
        return self._source.version

    async def start(self) -> None:
        """Find out what the servers are. A server that cannot be reached counts as dead; one must be alive."""
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise RuntimeError("a server engine belongs to one event loop: use Actor.run or Sampler.grow_all")
        self._loop = loop
        async with self._starting:
            if self._started:
                return
            found = await asyncio.gather(*(replica.connect() for replica in self._replicas), return_exceptions=True)
            self._sort_out(self._replicas, found)
            self._learn()
            await self._require_some()
            self._started = True

    async def open(
        self,
        tree: Tree,
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None = None,
        *,
        entropies: bool = False,
    ) -> ServerHandle:
        """A handle for `tree` at the live server with the fewest trees."""
        await self.start()
        require_answerable(tree, self.context, "serve the model with a longer context", entropies=entropies)
        for replica in self._replicas:
            if replica.protocol is not None and (refusal := replica.protocol.refusal(sampling)):
                raise EngineError(f"{replica.url}: {refusal}")
        handle = self._open.add(ServerHandle(self, tree, sampling, frozenset(stop_ids)))
        try:
            await self._replica_of(handle)
        except BaseException:  # raised again once the handle is forgotten
            self._forget(handle)
            raise
        return handle

    async def load_weights(self, version: int) -> None:
        """Send the model's weights to every live server and compare what it then samples with the model here.

        Raises `EngineError` if a server cannot take them or still decodes with others.
        """
        self._open.require_none()
        await self.start()
        old, self._source.version = self._source.path, version
        self._source.write()
        for replica in self._replicas:
            replica.holds = None
        live = [replica for replica in self._replicas if replica.alive]
        found = await asyncio.gather(*(replica.make_ready() for replica in live), return_exceptions=True)
        self._sort_out(live, found)
        await self._require_some()
        self._source.drop(old)

    async def close(self) -> None:
        """Close the connections."""
        tasks = list(self._revivals.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._replicas:
            await replica.close()

    # Where trees go ------------------------------------------------------------------------------------------------

    async def _replica_of(self, handle: ServerHandle) -> Replica:
        """The live server that `handle` sticks to, ready to decode; another one if that has died."""
        while True:
            if handle.replica is None:
                self._revive(self._settings.revive_s)
                await self._require_some()
                live = [replica for replica in self._replicas if replica.alive]
                handle.replica = min(live, key=lambda replica: (replica.trees, replica.outstanding))
                handle.replica.trees += 1
            replica = handle.replica
            if replica.ready:
                return replica
            try:
                await replica.make_ready()
            except DeadError as error:
                self._mark_dead(replica, str(error))

    def _forget(self, handle: ServerHandle) -> None:
        if self._open.discard(handle) and handle.replica is not None:
            handle.replica.trees -= 1

    def _mark_dead(self, replica: Replica, reason: str) -> None:
        """Take the trees from a server that is dead; it is asked again later."""
        replica.reason, replica.asked_at, replica.holds = reason, time.monotonic(), None
        if not replica.alive:
            return
        replica.alive, replica.trees, moved = False, 0, 0
        for handle in self._open:
            if handle.replica is replica:
                handle.replica, moved = None, moved + 1
        left = sum(other.alive for other in self._replicas)
        log.warning(
            "engine: %s is dead (%s): %d open trees go on at the %d servers left; it is asked again every %g s",
            *(replica.url, reason, moved, left, self._settings.revive_s),
        )

    def _revive(self, after_s: float) -> None:
        """Ask those dead servers again that were last asked at least `after_s` ago; the others go on meanwhile."""
        for replica in self._replicas:
            due = time.monotonic() - replica.asked_at >= after_s
            if not replica.alive and due and replica not in self._revivals:
                self._revivals[replica] = asyncio.ensure_future(self._reach_again(replica))

    async def _reach_again(self, replica: Replica) -> None:
        try:
            await replica.connect()
            await replica.make_ready()
        except (DeadError, EngineError) as error:
            replica.reason = str(error)
            return
        finally:
            replica.asked_at = time.monotonic()
            del self._revivals[replica]
        replica.alive = True
        self._learn()
        log.warning("engine: %s is back, with version %d of the weights", replica.url, self.version)

    async def _require_some(self) -> None:
        """Raise `EngineError` if no server is alive; before that, each is asked once more."""
        if any(replica.alive for replica in self._replicas):
            return
        self._revive(min(1.0, self._settings.revive_s))
        if self._revivals:
            await asyncio.wait(list(self._revivals.values()))
        if not any(replica.alive for replica in self._replicas):
            reasons = "; ".join(f"{replica.url}: {replica.reason}" for replica in self._replicas)
            raise EngineError(f"no server answers ({reasons}): start them (docs/engines.md), or correct engine.urls")

    def _sort_out(self, replicas: Collection[Replica], found: Collection[BaseException | None]) -> None:
        """Mark those `replicas` as dead whose error in `found` says so; raise any other error."""
        for replica, error in zip(replicas, found, strict=True):
            if isinstance(error, DeadError):
                self._mark_dead(replica, str(error))
        for error in found:
            if error is not None and not isinstance(error, DeadError):
                raise error

    def _learn(self) -> None:
        known = [replica for replica in self._replicas if replica.protocol is not None]
        self.context = min([self.context, *(replica.context for replica in known if replica.context)])
        blocks = [replica.protocol.block for replica in known if replica.protocol is not None]
        self.granularity = self._settings.block_tokens or max(blocks, default=1)
