"""An engine over HTTP: trees are spread over inference servers, and each sticks to one, which has its prefix cached.

A request carries its whole prefix, so that a tree whose server dies goes on at another from what is known. A server
gets no tree before it was seen to decode with the right weights (`engines.probe`): at first, after every update, when
it is back from the dead, and after every broken connection, for it may have been started anew.

Who is responsible for what: a `Replica` sends a request again; this module moves trees; the sampler turns what is left,
an `EngineError`, into a failed leaf.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from treepo.engines import Sampling, Segment
from treepo.engines.remote.protocols import Ask, checked, require_answerable
from treepo.engines.remote.replica import BrokenError, DeadError, Replica
from treepo.engines.settings import ServerSettings
from treepo.engines.weight_check import SAMPLING, Probe, mismatch, probe, probe_tree
from treepo.engines.weight_files import save
from treepo.errors import EngineError
from treepo.models import causal_lm, lora
from treepo.tree import Tree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Single:
    """The probe's tree at one server, whatever that decodes with."""

    replica: Replica
    tree: Tree
    version: int

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        ask = Ask(self.tree.tokens(node), max_tokens, seed, SAMPLING, ())
        reply = await self.replica.generate(ask, patient=True)
        self.replica.label = reply.weights
        return Segment(*checked(ask, reply), self.version)

    def close(self) -> None: ...


class ServerHandle:
    """One tree of a `ServerEngine`."""

    def __init__(self, engine: ServerEngine, tree: Tree, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._engine, self.tree, self.sampling, self.stop_ids = engine, tree, sampling, stop_ids
        self.replica: Replica | None = None  # where the tree is; None: to be chosen

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """Continue the prefix that ends with `node`; see `Handle`."""
        ask = Ask.of(self, node, max_tokens, seed, self._engine.context)
        why = ""
        for _ in range(len(self._engine._replicas) + self._engine._settings.retries + 1):
            replica = await self._engine._replica_of(self)
            try:
                reply = await replica.generate(ask)
            except (DeadError, BrokenError) as error:
                why = f"{replica.url}: {error}"
                if isinstance(error, DeadError):
                    self._engine._bury(replica, str(error))
                continue
            if reply.weights == replica.label:
                return Segment(*checked(ask, reply), self._engine.version)
            why = f"{replica.url} has the weights {reply.weights}, not {replica.label}: does another run use it?"
            replica.holds = None  # somebody has restarted it, or sent it other weights
        raise EngineError(f"a request failed again and again; the last time: {why}")

    def close(self) -> None:
        """The server's cache forgets the tree by itself."""
        self._engine._forget(self)


class ServerEngine:
    """Asks the servers of `settings` for segments, and sends them the weights of `model` through `folder`.

    `sends`: whether this process is the one that sends weights; of several that share the servers, one does.
    """

    def __init__(
        self, model: PreTrainedModel, settings: ServerSettings, folder: str | Path, *, sends: bool = True
    ) -> None:
        self._model, self._settings, self._sends = model, settings, sends
        self._folder = Path(folder).expanduser().absolute()
        self._weights: Path | None = None  # those that the servers were asked to load; None: the ones they began with
        self._adapter: str | None = None  # what they call those, if they are an adapter
        self._replicas = [Replica(url, settings, adapters=lora.adapted(model)) for url in settings.urls]
        self._handles: set[ServerHandle] = set()
        self._revivals: dict[Replica, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting, self._started = asyncio.Lock(), False
        self.context = causal_lm.context(model)
        self.tree_tokens = 1 << 60
        self.granularity = settings.block_tokens or 1
        self.version = 0

    async def start(self) -> None:
        """Find out what the servers are; those that cannot be reached count as dead, and one must be left."""
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
            if replica.dialect is not None and (refusal := replica.dialect.refusal(sampling)):
                raise EngineError(f"{replica.url}: {refusal}")
        handle = ServerHandle(self, tree, sampling, frozenset(stop_ids))
        self._handles.add(handle)
        try:
            await self._replica_of(handle)
        except BaseException:  # not handled, only tidied up after
            self._forget(handle)
            raise
        return handle

    async def load_weights(self, version: int) -> None:
        """Send the model's weights to every live server and compare what it then samples with the model here.

        Raises `EngineError` if a server cannot take them or still decodes with others.
        """
        if self._handles:
            raise RuntimeError(f"{len(self._handles)} trees are open: close them before the weights change")
        await self.start()
        self.version, old = version, self._weights
        self._write(version)
        for replica in self._replicas:
            replica.holds = None
        live = [replica for replica in self._replicas if replica.alive]
        found = await asyncio.gather(*(self._make_ready(replica) for replica in live), return_exceptions=True)
        self._sort_out(live, found)
        await self._require_some()
        if old is not None and old != self._weights:
            shutil.rmtree(old, ignore_errors=True)

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
            if replica.holds == self.version:
                return replica
            try:
                await self._make_ready(replica)
            except DeadError as error:
                self._bury(replica, str(error))

    def _forget(self, handle: ServerHandle) -> None:
        if handle in self._handles:
            self._handles.remove(handle)
            if handle.replica is not None:
                handle.replica.trees -= 1

    def _bury(self, replica: Replica, reason: str) -> None:
        """Move the trees of a server that is dead; it is asked again later."""
        replica.reason, replica.asked_at, replica.holds = reason, time.monotonic(), None
        if not replica.alive:
            return
        replica.alive, replica.trees, moved = False, 0, 0
        for handle in self._handles:
            if handle.replica is replica:
                handle.replica, moved = None, moved + 1
        left = sum(other.alive for other in self._replicas)
        log.warning(
            "engine: %s is dead (%s): %d open trees go on at the %d servers left; it is asked again every %g s",
            *(replica.url, reason, moved, left, self._settings.revive_s),
        )

    def _revive(self, after_s: float) -> None:
        """Ask the dead that were last asked at least `after_s` ago, while the others go on."""
        for replica in self._replicas:
            due = time.monotonic() - replica.asked_at >= after_s
            if not replica.alive and due and replica not in self._revivals:
                self._revivals[replica] = asyncio.ensure_future(self._ask_the_dead(replica))

    async def _ask_the_dead(self, replica: Replica) -> None:
        try:
            await replica.connect()
            await self._make_ready(replica)
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
        """At least one server is alive; where none is, each is asked once more."""
        if any(replica.alive for replica in self._replicas):
            return
        self._revive(min(1.0, self._settings.revive_s))
        if self._revivals:
            await asyncio.wait(list(self._revivals.values()))
        if not any(replica.alive for replica in self._replicas):
            reasons = "; ".join(f"{replica.url}: {replica.reason}" for replica in self._replicas)
            raise EngineError(f"no server answers ({reasons}): start them (docs/engines.md), or correct engine.urls")

    def _sort_out(self, replicas: Collection[Replica], found: Collection[BaseException | None]) -> None:
        """Bury the dead; any other error is raised."""
        for replica, error in zip(replicas, found, strict=True):
            if isinstance(error, DeadError):
                self._bury(replica, str(error))
        for error in found:
            if error is not None and not isinstance(error, DeadError):
                raise error

    def _learn(self) -> None:
        known = [replica for replica in self._replicas if replica.dialect is not None]
        self.context = min([self.context, *(replica.context for replica in known if replica.context)])
        blocks = [replica.dialect.block for replica in known if replica.dialect is not None]
        self.granularity = self._settings.block_tokens or max(blocks, default=1)

    # Weights -------------------------------------------------------------------------------------------------------

    async def _make_ready(self, replica: Replica) -> None:
        """See to it that `replica` decodes with the model's weights; raises `DeadError`, or `EngineError` if not.

        Before the first update a server is taken as it is if its log-probs are right, so that one which cannot be
        updated can be sampled from.
        """
        async with replica.lock:
            if replica.holds == self.version:
                return
            tolerance, before = self._settings.tolerance, None
            if self._weights is not None:
                before = replica.probed
                await replica.load(str(self._weights), self._adapter)
            replica.adapter = self._adapter
            found = await self._probe(replica)
            if found.difference > tolerance and self._weights is None and self._sends and replica.update:
                log.warning("engine: %s gets the model's weights, for it has others", replica.url)
                self._write(self.version)
                await replica.load(str(self._weights), self._adapter)
                found = await self._probe(replica)
            if why := mismatch(found, before, tolerance):
                raise EngineError(f"{replica.url}, version {self.version} of the weights: {why}")
            replica.holds = self.version

    async def _probe(self, replica: Replica) -> Probe:
        tree = probe_tree(self._model)
        replica.probed = await probe(_Single(replica, tree, self.version), tree, self._model)
        return replica.probed

    def _write(self, version: int) -> None:
        self._adapter = lora.name_of(self._model) if lora.adapted(self._model) else None
        self._weights = save(self._model, self._folder, version) if self._sends else None
