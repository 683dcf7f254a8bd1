"""Inference servers on the loopback device: `treepo serve` in a thread of its own, and ways for it to fail."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.responses import JSONResponse, Response

from treepo.engines.local.engine import LocalEngine
from treepo.engines.remote.engine import ServerEngine
from treepo.engines.settings import LocalSettings, ServerSettings
from treepo.models import causal_lm
from treepo.models.causal_lm import stop_ids
from treepo.serve.app import build_app
from treepo.serve.prefixes import Prefixes
from treepo.serve.schemas import Server

GENERATE = "/inference/v1/generate"

Intercept = Callable[[str, int], "Response | float | None"]
"""(path, number of this request for it, from 1) -> a reply in place of the server's, seconds to wait, or None."""


class Served:
    """A server in a thread: the model in `folder`, or `app`."""

    def __init__(
        self,
        folder: Path,
        *,
        intercept: Intercept | None = None,
        port: int = 0,
        slots: int = 128,
        tokens: int = 100_000,
        api_key: str | None = None,
    ) -> None:
        tokenizer, self.model = causal_lm.load_tokenizer(str(folder)), causal_lm.load(str(folder))
        self.engine = LocalEngine(self.model, LocalSettings(slots=slots))
        self.prefixes = Prefixes(self.engine, tokens)
        about = Server(
            "tiny",
            self.engine.context,
            self.model.config.vocab_size,
            stop_ids(self.model, tokenizer),
            lambda text: list(tokenizer.encode(text)),
            lambda ids: str(tokenizer.decode(ids)),
        )
        self.asked: list[tuple[str, Any]] = []  # path and body of every request
        self._app = build_app(self.model, self.prefixes, about, api_key)
        self._intercept, self._counts = intercept, dict[str, int]()
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self,
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=3600,  # on a busy machine a test may pause: that must break no connection
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self._counts[path] = self._counts.get(path, 0) + 1
        found = self._intercept(path, self._counts[path]) if self._intercept else None
        if isinstance(found, Response):
            await found(scope, receive, send)
            return
        if found is not None:
            await asyncio.sleep(found)
        message = await receive()
        self.asked.append((path, message.get("body", b"")))
        waiting = [message]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, again, send)

    def count(self, path: str) -> int:
        """How many requests there were for `path`, those included that `intercept` answered."""
        return self._counts.get(path, 0)

    def loaded(self, path: str, key: str) -> list[str]:
        """The value of `key` in the requests for `path`, in order; a request that was sent again counts once.

        So a test says which weights arrived, and in which order, however often a busy machine made us ask.
        """
        found = [str(json.loads(body)[key]) for asked, body in self.asked if asked == path]
        return [value for i, value in enumerate(found) if not i or value != found[i - 1]]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()

    def __enter__(self) -> Served:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


@contextmanager
def subprocess_serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`treepo serve` as users start it: the process and its address."""
    code = "from treepo.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", folder, "--port", "0", "--threads", "1", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


class Cut(Response):
    """A reply whose connection breaks before it is complete."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"{"})


def refusing(status: int, times: int, *paths: str) -> Intercept:
    """The first `times` requests for `paths` are answered with an error."""
    error = JSONResponse({"error": {"message": "for a test", "type": "Test", "param": None, "code": status}}, status)
    return lambda path, count: error if path in paths and count <= times else None


def engine_of(model: Any, folder: Path, *servers: Served | str, sends: bool = True, **settings: Any) -> ServerEngine:
    """The engine that asks `servers`; it waits briefly before it asks again, and long for an answer."""
    urls = [server if isinstance(server, str) else server.url for server in servers]
    quick = {"backoff_s": 0.02, "tolerance": 1e-3, "timeout_s": 200.0, "connect_s": 100.0} | settings
    return ServerEngine(model, ServerSettings(kind="server", urls=urls, **quick), folder, sends=sends)
