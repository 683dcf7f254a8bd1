"""One inference server: recognise it, ask it, and know when it is dead."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

import httpx2

from treepo.engines.remote.protocols import DIALECTS, Ask, Dialect, Json, Reply, Update, recognised, update_of
from treepo.engines.settings import ServerSettings
from treepo.engines.weight_check import Probe
from treepo.errors import ConfigError, EngineError

AGAIN = frozenset({408, 429, 500, 502, 503, 504})
FOR_WEIGHTS = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, or use SGLang or treepo serve"
FOR_ADAPTERS = (
    "start vLLM with --enable-lora --max-lora-rank RANK, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, "
    "or SGLang with --enable-lora --max-lora-rank RANK --lora-target-modules all; treepo serve wants peft installed"
)


class DeadError(Exception):
    """A server cannot be reached; never seen by users of the engine, which goes on with the others."""


class BrokenError(Exception):
    """The server may be another process by now, with other weights. Not seen by users either."""


class Replica:
    """A server. Its requests are bounded in number, share connections, and are sent again when they fail in passing."""

    def __init__(self, url: str, settings: ServerSettings, *, adapters: bool = False) -> None:
        self.url = url
        self._settings, self._adapters = settings, adapters
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers=_headers(settings),
            timeout=httpx2.Timeout(settings.timeout_s, connect=settings.connect_s),
            limits=httpx2.Limits(
                # One more than may ask, for the question whether it is well.
                max_connections=settings.concurrency + 1,
                max_keepalive_connections=settings.concurrency + 1,
            ),
        )
        self._places = asyncio.Semaphore(settings.concurrency)
        self.dialect: Dialect | None = None  # None: never reached
        self.update: Update | None = None
        self.model = ""  # as the server calls it
        self.adapter: str | None = None  # what is asked for in its place
        self.context: int | None = None  # None: it does not say
        self.alive = True
        self.asked_at = 0.0  # when it was last asked whether it is alive, by the monotonic clock
        self.reason = ""  # why it is dead
        self.trees = 0  # open ones that stick to it
        self.outstanding = 0
        self.holds: int | None = None  # the version that it was seen to decode with; None: to be found out
        self.probed: Probe | None = None  # the last one
        self.label: str | None = None  # what it then called its weights; None: it does not say
        self.lock = asyncio.Lock()  # of whoever finds out

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
        self.dialect = recognised(paths) if wanted == "auto" else DIALECTS[wanted]
        self.update = update_of(paths, self.dialect, adapters=self._adapters)
        if self.dialect is None:
            raise EngineError(
                f"{self.url} speaks none of {', '.join(d.path for d in DIALECTS.values())}: vllm serve, "
                "sglang.launch_server and treepo serve do; name engine.dialect if it hides its paths"
            )

    async def generate(self, ask: Ask, *, patient: bool = False) -> Reply:
        """What the server answers; raises `DeadError`, or `EngineError` if this request cannot be answered.

        `patient`: ask again over a new connection if one breaks, where else that is a `BrokenError`.
        """
        dialect = self.dialect
        if dialect is None:
            raise RuntimeError("the server was never reached")
        self.outstanding += 1
        try:
            async with self._places:
                body = dialect.body(self.model, ask, self.adapter)
                response = await self._send("POST", dialect.path, body, patient=patient)
        finally:
            self.outstanding -= 1
        try:
            return dialect.read(response.json())
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self.url}{dialect.path} sent a reply of another form than expected "
                f"({type(error).__name__}: {error}): {_short(response.text)}"
            ) from error

    async def load(self, folder: str, adapter: str | None = None) -> None:
        """Have the server load the weights in `folder`, which are an adapter if that is named; raises as `generate`."""
        if self.update is None:
            what = f"new weights: {FOR_WEIGHTS}" if adapter is None else f"adapters: {FOR_ADAPTERS}"
            raise EngineError(f"{self.url} cannot take {what} (docs/engines.md)")
        last, self.adapter = self.adapter, adapter
        for path, body, needed in self.update.requests(folder, adapter, last):
            try:
                await self._load(path, body)
            except EngineError as error:
                if needed and adapter is not None:
                    raise EngineError(f"{error}; {FOR_ADAPTERS} (docs/engines.md)") from error
                if needed:
                    raise

    async def _load(self, path: str, body: Json) -> None:
        for attempt in range(self._settings.retries + 1):
            response = await self._send("POST", path, body)
            if _succeeded(response):
                return
            # A cache cannot be emptied while the last blocks of a request that was given up are let go.
            await asyncio.sleep(self._settings.backoff_s * 2**attempt)
        raise EngineError(f"{self.url}{path} failed: {_message(response)}")

    async def _paths(self) -> set[str]:
        """The paths that the server has, as far as it says."""
        response = await self._get("/openapi.json")
        if response is not None:
            found = response.json().get("paths", {})
            return set(found)
        # The description can be switched off. Only SGLang knows the first two of these, the second by its older name,
        # and only vLLM the last.
        if await self._get("/model_info") is not None or await self._get("/get_model_info") is not None:
            return {"/generate", "/update_weights_from_disk", "/load_lora_adapter"}
        return {"/v1/completions"} if await self._get("/version") is not None else set()

    async def _get(self, path: str) -> httpx2.Response | None:
        """None: the server has no such page."""
        try:
            response = await self._client.get(path)
        except httpx2.TransportError as error:
            raise DeadError(_why(error)) from error
        return response if response.status_code == 200 else None

    async def _send(self, method: str, path: str, body: Json | None = None, *, patient: bool = True) -> httpx2.Response:
        """A good response; what fails in passing is sent again, each time after a longer pause."""
        settings, why, status = self._settings, "", None
        for attempt in range(settings.retries + 1):
            if attempt:
                await asyncio.sleep(settings.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
                if not self.alive:
                    raise DeadError(self.reason)  # others have found out meanwhile
            try:
                response = await self._client.request(method, path, json=body)
            except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
                # Whoever has waited that long does not wait again.
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
                self.holds = None  # it has forgotten the adapter
                raise BrokenError(why)
            if status not in AGAIN:
                raise self._refused(path, response)
        if status is not None:
            await self._require_well(why)
            raise EngineError(f"{self.url}{path}: {why} ({settings.retries + 1} times)")
        raise DeadError(why)

    async def _require_well(self, why: str) -> None:
        """One request may fail where the server is well; raises `DeadError` if it is not."""
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


def _headers(settings: ServerSettings) -> dict[str, str]:
    if settings.api_key_env is None:
        return {}
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise ConfigError(f"engine.api_key_env: the environment has no {settings.api_key_env}")
    return {"Authorization": f"Bearer {key}"}


def _succeeded(response: httpx2.Response) -> bool:
    """Whether a good response does not say that what was asked for failed after all."""
    try:
        said = response.json()
    except ValueError:
        return True  # an empty body
    return not (isinstance(said, dict) and said.get("success") is False)


def _why(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def _message(response: httpx2.Response) -> str:
    """The reason in an error reply, wherever the server puts it."""
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
