"""The paths of `treepo serve`: those of vLLM and SGLang that a client needs to sample and to send new weights."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from transformers import PreTrainedModel

from treepo import __version__
from treepo.errors import ConfigError, EngineError
from treepo.models import lora
from treepo.serve import schemas
from treepo.serve.prefixes import Answer, NotLoadedError, Prefixes
from treepo.serve.schemas import BadRequestError, Body, Job, Server

Parse = Callable[[Body, Server], Job]
Write = Callable[[Job, Answer, Server], dict[str, Any]]
Endpoint = Callable[[Request], Awaitable[Response]]
GONE = 499  # the client has gone, so nobody reads the reply
SGLANG = ("/generate", "/load_lora_adapter", "/unload_lora_adapter")


def build_app(model: PreTrainedModel, prefixes: Prefixes, server: Server, api_key: str | None = None) -> Starlette:
    """The application; with an `api_key`, requests other than `/health` need it as their bearer token."""

    def generating(parse: Parse, write: Write) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            job = parse(await _json(request), server)
            call = prefixes.generate(job.ids, job.max_tokens, job.seed, job.sampling, job.stop_ids, job.adapter)
            answer = await unless_gone(request, call)
            return Response(status_code=GONE) if answer is None else _reply(write(job, answer, server))

        return endpoint

    async def update(request: Request) -> Response:
        body = await _json(request)
        folder = body.get("model_path")
        if not isinstance(folder, str):
            raise BadRequestError("model_path must be a folder.")
        try:
            await prefixes.update(str(body.get("weight_version") or folder), lambda: load_weights(model, Path(folder)))
        except ConfigError as error:
            return _reply({"success": False, "message": str(error), "num_paused_requests": 0}, 400)
        return _reply({"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0})

    def loading(*, sglang: bool) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            name, folder = schemas.adapter_of(await _json(request))
            if folder is None:
                raise BadRequestError("lora_path must be a folder.")
            try:
                await prefixes.update(None, lambda: replace_adapter(model, Path(folder)), name)
            except ConfigError as error:
                raise BadRequestError(str(error)) from error
            return _loaded(f"LoRA adapter '{name}' added successfully.", name, sglang=sglang)

        return endpoint

    def unloading(*, sglang: bool) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            name, _ = schemas.adapter_of(await _json(request))
            if name != prefixes.adapter:
                raise NotLoadedError(f"The lora adapter '{name}' cannot be found.")
            await prefixes.update(None, lambda: lora.detach(model))
            return _loaded(f"LoRA adapter '{name}' removed successfully.", None, sglang=sglang)

        return endpoint

    def plainly(reply: Callable[[], Response]) -> Endpoint:
        async def endpoint(_: Request) -> Response:
            return reply()

        return endpoint

    def flush() -> Response:
        prefixes.flush()
        return PlainTextResponse("Cache flushed.\n")

    def info() -> Response:
        known = {"model_path": server.model, "tokenizer_path": server.model, "is_generation": True}
        return _reply({**known, "weight_version": prefixes.weights})

    def openapi() -> Response:
        return _reply(schemas.description({path: methods for path, (methods, _) in paths.items()}, __version__))

    paths: dict[str, tuple[list[str], Endpoint]] = {
        "/inference/v1/generate": (["POST"], generating(schemas.vllm_generate, schemas.vllm_generate_reply)),
        "/v1/completions": (["POST"], generating(schemas.completions, schemas.completions_reply)),
        "/generate": (["POST"], generating(schemas.sglang, schemas.sglang_reply)),
        "/update_weights_from_disk": (["POST"], update),
        "/flush_cache": (["GET", "POST"], plainly(flush)),
        "/reset_prefix_cache": (["POST"], plainly(flush)),
        "/model_info": (["GET"], plainly(info)),
        "/get_model_info": (["GET"], plainly(info)),
        "/v1/models": (["GET"], plainly(lambda: _reply(schemas.models(server, prefixes.adapter)))),
        "/version": (["GET"], plainly(lambda: _reply({"version": __version__}))),
        "/openapi.json": (["GET"], plainly(openapi)),
    }
    if find_spec("peft") is not None:
        for prefix in ("/v1", ""):  # vLLM's and SGLang's
            paths[f"{prefix}/load_lora_adapter"] = (["POST"], loading(sglang=not prefix))
            paths[f"{prefix}/unload_lora_adapter"] = (["POST"], unloading(sglang=not prefix))
    routes = [
        Route(path, _guarded(endpoint, api_key, sglang=path in SGLANG), methods=methods)
        for path, (methods, endpoint) in paths.items()
    ]
    return Starlette(routes=[*routes, Route("/health", plainly(Response))])


async def unless_gone(request: Request, call: Awaitable[Answer]) -> Answer | None:
    """The result of `call`; if the client goes away before, `call` is cancelled and the result is None."""
    work = asyncio.ensure_future(call)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the safetensors of `folder` into `model`, after removing its adapter if it has one.

    Of tied weights one is enough. Raises `ConfigError` if the folder cannot be read or has other names or shapes than
    the model; then the model's own weights are unchanged.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"model_path: {folder} is no folder with *.safetensors")
    try:
        new = {name: value for file in files for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model_path: {folder} cannot be read: {error}") from error
    lora.detach(model)
    own = model.state_dict()
    stored = {own[name].data_ptr() for name in new if name in own}
    wrong = sorted(
        {name for name in own if name not in new and own[name].data_ptr() not in stored} | (new.keys() - own)
    )
    wrong += [name for name, value in new.items() if name in own and value.shape != own[name].shape]
    if wrong:
        raise ConfigError(f"model_path: {folder} holds another model: {', '.join(wrong[:3])} differ")
    model.load_state_dict(new, strict=False)


def replace_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give `model` the adapter in `folder`, after removing the one that it may have; raises `ConfigError`."""
    lora.detach(model)
    lora.restore(model, folder)


def _guarded(endpoint: Endpoint, api_key: str | None, *, sglang: bool) -> Endpoint:
    """`endpoint`, which also checks the key and reports errors in the form of the server that it imitates."""

    async def guarded(request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if api_key is not None and not secrets.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            return _reply({"error": "Unauthorized"}, 401)
        try:
            return await endpoint(request)
        except BadRequestError as error:
            return _failure(str(error), "BadRequestError", 400, sglang=sglang)
        except NotLoadedError as error:
            return _failure(str(error), "NotFoundError", 400 if sglang else 404, sglang=sglang)
        except EngineError as error:
            return _failure(str(error), "InternalServerError", 500, sglang=sglang)

    return guarded


def _failure(message: str, kind: str, status: int, *, sglang: bool) -> Response:
    more = {} if sglang else {"type": kind, "param": None, "code": status}
    return _reply({"error": {"message": message, **more}}, status)


def _loaded(message: str, name: str | None, *, sglang: bool) -> Response:
    if not sglang:
        return PlainTextResponse(f"Success: {message}")
    return _reply({"success": True, "error_message": "", "loaded_adapters": {} if name is None else {name: name}})


def _reply(content: dict[str, Any], status: int = 200) -> Response:
    return JSONResponse(content, status)


async def _json(request: Request) -> Body:
    try:
        body = await request.json()
    except ValueError as error:
        raise BadRequestError(f"The body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError("The body is no JSON object.")
    return body


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
