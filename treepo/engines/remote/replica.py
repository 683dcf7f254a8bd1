"""One inference server: recognise it, ask it for segments, see that it has the weights, and notice when it is dead."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from treepo.engines import Segment
from treepo.engines.remote.protocols import (
    WIRE_PROTOCOLS,
    Json,
    SegmentReply,
    SegmentRequest,
    WeightUpdate,
    WireProtocol,
    checked,
    recognised,
    update_of,
)
from treepo.engines.settings import ServerSettings
from treepo.engines.weight_check import SAMPLING, WeightGuard
from treepo.engines.weight_files import WeightSource
from treepo.errors import ConfigError, EngineError
from treepo.models import lora
from treepo.tree import Tree

log = logging.getLogger(__name__)

AGAIN = frozenset({408, 429, 500, 502, 503, 504})  # the status of an error that may pass
# vLLM closes a connection that was unused for 5 s. A request that is sent at that moment breaks, and costs a probe and
# a load of the weights. So we close such connections earlier.
KEEP_ALIVE_S = 2.0
FOR_WEIGHTS = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, or use SGLang or treepo serve"
FOR_ADAPTERS = (
    "start vLLM with --enable-lora --max-lora-rank RANK, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, "
    "or SGLang with --enable-lora --max-lora-rank RANK --lora-target-modules all; treepo serve wants peft installed"
)


class DeadError(Exception):
    """A server cannot be reached. The engine goes on with the other servers; its users never see this error."""


class BrokenError(Exception):
    """The server may be another process by now, with other weights. Users of the engine never see this error."""


class Replica(WeightGuard):
    """A server. The number of its requests at a time is bounded, and they share connections.

    A request that fails is sent again if the failure may pass.
    """

    def __init__(self, url: str, settings: ServerSettings, source: WeightSource) -> None:
        super().__init__(url, source, settings.tolerance)
        self.url, self._settings = url, settings
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers=_headers(settings),
            timeout=httpx2.Timeout(settings.timeout_s, connect=settings.connect_s),
            limits=httpx2.Limits(
                # One connection more than there are segments at a time: for the question whether the server is well.
                max_connections=settings.concurrency + 1,
                max_keepalive_connections=settings.concurrency + 1,
                keepalive_expiry=KEEP_ALIVE_S,
            ),
        )
        self._places = asyncio.Semaphore(settings.concurrency)
        self.protocol: WireProtocol | None = None  # None: the server was never reached
        self.update: WeightUpdate | None = None  # None: it takes no weights
        self.model = ""  # the server's name for it
        self.adapter: str | None = None  # the name to ask for in place of the model's
        self.context: int | None = None  # None: the server does not say
        self.alive = True
        self.asked_at = 0.0  # when we last tried to reach it, by the monotonic clock
        self.reason = ""  # why it is dead
        self.trees = 0  # open ones that stick to it
        self.outstanding = 0  # requests under way
        self.label: str | None = None  # its name for its weights at the last probe; None: it does not name them

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def connect(self) -> None:
        """Find out what the server is; raises `DeadError`, or `EngineError` for one that cannot be used."""
        self.asked_at = time.monotonic()
        models = (await self._send("GET", "/v1/models")).json()
        try:
            first = models["data"][0]
            self.model, self.context = str(first["id"]), first.get("max_model_len")
        except (LookupError, TypeError) as error:
            raise EngineError(f"{self.url}/v1/models names no model: is this an inference server?") from error
        paths = await self._paths()
        wanted = self._settings.dialect
        self.protocol = recognised(paths) if wanted == "auto" else WIRE_PROTOCOLS[wanted]
        self.update = update_of(paths, self.protocol, adapters=lora.adapted(self.source.model))
        if self.protocol is None:
            raise EngineError(
                f"{self.url} speaks none of {', '.join(p.path for p in WIRE_PROTOCOLS.values())}: vllm serve, "
                "sglang.launch_server and treepo serve do; name engine.dialect if it hides its paths"
            )

    async def generate(self, request: SegmentRequest, *, patient: bool = False) -> SegmentReply:
        """The server's answer; raises `DeadError`, or `EngineError` if this request cannot be answered.

        `patient`: if the connection breaks, ask again over a new one; else a broken connection is a `BrokenError`.
        """
        protocol = self.protocol
        if protocol is None:
            raise RuntimeError("the server was never reached")
        self.outstanding += 1
        try:
            async with self._places:
                body = protocol.body(self.model, request, self.adapter)
                response = await self._send("POST", protocol.path, body, patient=patient)
        finally:
            self.outstanding -= 1
        try:
            return protocol.read(response.json())
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self.url}{protocol.path} sent a reply of another form than expected "
                f"({type(error).__name__}: {error}): {_short(response.text)}"
            ) from error

    # Weights -------------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Have the server load the weights that were written last; raises as `generate` does."""
        source = self.source
        if self.update is None:
            what = f"adapters: {FOR_ADAPTERS}" if lora.adapted(source.model) else f"new weights: {FOR_WEIGHTS}"
            raise EngineError(f"{self.url} cannot take {what} (docs/engines.md)")
        last, self.adapter = self.adapter, source.adapter
        for path, body, needed in self.update.requests(str(source.path), source.adapter, last):
            try:
                await self._post_until_done(path, body)
            except EngineError as error:
                if needed and source.adapter is not None:
                    raise EngineError(f"{error}; {FOR_ADAPTERS} (docs/engines.md)") from error
                if needed:
                    raise

    async def _load_first(self) -> None:
        log.warning("engine: %s gets the model's weights, for it has others", self.url)
        if self.source.path is None:
            self.source.write()
        await self._load()

    def _probe_handle(self, tree: Tree) -> ProbeHandle:
        self.adapter = self.source.adapter
        return ProbeHandle(self, tree)

    def _due(self) -> bool:
        return self.source.path is not None

    def _can_load(self) -> bool:
        return self.source.writes and self.update is not None

    # Requests ------------------------------------------------------------------------------------------------------

    async def _post_until_done(self, path: str, body: Json) -> None:
        for attempt in range(self._settings.retries + 1):
            response = await self._send("POST", path, body)
            if _succeeded(response):
                return
            # A cache cannot be emptied as long as an abandoned request holds blocks.
            await asyncio.sleep(self._settings.backoff_s * 2**attempt)
        raise EngineError(f"{self.url}{path} failed: {_message(response)}")

    async def _paths(self) -> set[str]:
        """The paths that the server has, as far as it tells."""
        response = await self._get("/openapi.json")
        if response is not None:
            found = response.json().get("paths", {})
            return set(found)
        # The description can be switched off. Only SGLang has /model_info, whose older name is /get_model_info. Only
        # vLLM has /version.
        if await self._get("/model_info") is not None or await self._get("/get_model_info") is not None:
            return {"/generate", "/update_weights_from_disk", "/load_lora_adapter"}
        return {"/v1/completions"} if await self._get("/version") is not None else set()

    async def _get(self, path: str) -> httpx2.Response | None:
        """The page `path`; None: the server has no such page."""
        try:
            response = await self._client.get(path)
        except httpx2.TransportError as error:
            raise DeadError(_why(error)) from error
        return response if response.status_code == 200 else None

    async def _send(self, method: str, path: str, body: Json | None = None, *, patient: bool = True) -> httpx2.Response:
        """A good response; a request whose failure may pass is sent again, each time after a longer pause."""
        settings, why, status = self._settings, "", None
        for attempt in range(settings.retries + 1):
            if attempt:
                await asyncio.sleep(settings.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
                if not self.alive:
                    raise DeadError(self.reason)  # another request has found out meanwhile
            try:
                response = await self._client.request(method, path, json=body)
            except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
                # A second wait of that length would not help.
                await self._require_well(_why(error))
                raise EngineError(
                    f"{self.url}{path}: no answer in {settings.timeout_s:g} s: raise engine.timeout_s, or lower "
                    "engine.concurrency or the segments' length"
                ) from error
            except httpx2.TransportError as error:
                why, status, self.holds = _why(error), None, None
                if not patient:
                    raise BrokenError(why) from error
                continue
            if response.status_code == 200:
                return response
            status = response.status_code
            why = f"{status} {_message(response)}"
            if not patient and self.adapter is not None and self.adapter in why:
                self.holds = None  # the server has forgotten the adapter
                raise BrokenError(why)
            if status not in AGAIN:
                raise self._refused(path, response)
        if status is not None:
            await self._require_well(why)
            raise EngineError(f"{self.url}{path}: {why} ({settings.retries + 1} times)")
        raise DeadError(why)

    async def _require_well(self, why: str) -> None:
        """Raise `DeadError` if the server is not well; if it is, only one request has failed."""
        try:
            response = await self._client.get("/health", timeout=self._settings.connect_s)
        except httpx2.TransportError as error:
            raise DeadError(f"{why}; /health: {_why(error)}") from error
        if response.status_code not in (200, 404):
            raise DeadError(f"{why}; /health: {response.status_code}")

    def _refused(self, path: str, response: httpx2.Response) -> EngineError:
        said = f"{self.url}{path}: {response.status_code} {_message(response)}"
        if response.status_code == 401:
            name = self._settings.api_key_env
            key = f"is the key in ${name} right?" if name else "name the variable that holds it (engine.api_key_env)"
            return EngineError(f"{said}: the server wants an API key: {key}")
        return EngineError(said)


@dataclass(frozen=True, slots=True)
class ProbeHandle:
    """The probe's tree at one server, whatever weights that server has."""

    replica: Replica
    tree: Tree

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """Continue the prefix that ends with `node`, and remember the server's name for its weights."""
        request = SegmentRequest(self.tree.tokens(node), max_tokens, seed, SAMPLING, ())
        reply = await self.replica.generate(request, patient=True)
        self.replica.label = reply.weights
        return Segment(*checked(request, reply), self.replica.source.version)

    def close(self) -> None:
        """The server's cache forgets the tree by itself."""


def _headers(settings: ServerSettings) -> dict[str, str]:
    if settings.api_key_env is None:
        return {}
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise ConfigError(f"engine.api_key_env: the environment has no {settings.api_key_env}")
    return {"Authorization": f"Bearer {key}"}


def _succeeded(response: httpx2.Response) -> bool:
    """Whether a response of status 200 does not report a failure in its body."""
    try:
        said = response.json()
    except ValueError:
        return True  # an empty body
    return not (isinstance(said, dict) and said.get("success") is False)


def _why(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def _message(response: httpx2.Response) -> str:
    """The reason in an error reply, under whichever key the server puts it."""
    try:
        said: Any = response.json()
    except ValueError:
        return _short(response.text)
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return _short(said if isinstance(said, str) else str(said))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
