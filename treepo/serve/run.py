"""Load a model and serve it until a signal comes."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch
import uvicorn

from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError
from treepo.models import causal_lm
from treepo.models.settings import ModelSettings
from treepo.serve.app import build_app
from treepo.serve.prefixes import Prefixes
from treepo.serve.schemas import Server

KEEP_ALIVE_S = 600  # trainers pause between batches
GRACE_S = 5  # for requests under way when a signal comes


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served."""

    model: ModelSettings
    host: str
    port: int  # 0: any that is free
    engine: LocalSettings
    memory_gib: float  # of prefixes kept between requests
    api_key_env: str | None


def serve(settings: Serving, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `on_ready(url)` is called when connections are accepted."""
    api_key = None
    if settings.api_key_env is not None and not (api_key := os.environ.get(settings.api_key_env)):
        raise ConfigError(f"--api-key-env: the environment has no {settings.api_key_env}")
    path = settings.model.path
    if path is None:
        raise ConfigError("serve: name the folder of a model")
    tokenizer = causal_lm.load_tokenizer(path)
    model = causal_lm.load(path, settings.model.dtype, causal_lm.device(settings.model))
    engine = LocalEngine(model, settings.engine)
    with torch.no_grad():
        token_bytes = engine.cache(model, 1, 1).token_bytes
    tokens = int(settings.memory_gib * 2**30) // token_bytes

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    about = Server(
        path,
        engine.context,
        model.config.vocab_size,
        causal_lm.stop_ids(model, tokenizer),
        lambda text: [int(token) for token in tokenizer.encode(text)],
        decode,
    )
    listening = _listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listening.getsockname()[1]}"

    async def main() -> None:
        app = build_app(model, Prefixes(engine, tokens), about, api_key)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
            lifespan="off",
        )
        on_ready(url)
        await uvicorn.Server(config).serve(sockets=[listening])

    with listening:
        asyncio.run(main())


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
