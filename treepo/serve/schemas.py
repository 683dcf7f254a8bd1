"""Requests and replies of vLLM and SGLang, as far as they are about token ids.

If a request asks for something that this server does not do, it is refused. Nothing is ignored silently.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from treepo.engines import Sampling
from treepo.serve.prefixes import Answer

Body = Mapping[str, Any]

# `IGNORED` parameters do not change the tokens of a reply. `NEUTRAL` parameters would, so only values that have no
# effect are accepted.
IGNORED = frozenset(
    (
        *("user", "request_id", "rid", "priority", "cache_salt", "stream_options", "metadata", "detokenize"),
        *("skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "include_stop_str_in_output"),
        *("add_special_tokens", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs"),
        *("return_token_ids", "return_tokens_as_token_ids", "output_kind"),
    )
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "repetition_penalty", "length_penalty"), (1, None)),
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty", "min_tokens", "min_new_tokens"), (0, None)),
    **dict.fromkeys(("stream", "echo", "use_beam_search", "return_hidden_states"), (False, None)),
    **dict.fromkeys(("stop", "stop_regex", "bad_words", "logit_bias", "allowed_token_ids"), (None, "", [], {})),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "suffix", "structured_outputs"), (None,)),
    **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag", "kv_transfer_params"), (None,)),
    **dict.fromkeys(("features", "image_data", "custom_params", "extra_args"), (None,)),
}


class BadRequestError(Exception):
    """A request that cannot be answered as it is asked."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request in our own terms."""

    ids: list[int]
    max_tokens: int
    seed: int
    sampling: Sampling
    stop_ids: frozenset[int]
    logprobs: bool
    adapter: str | None = None  # None: the model itself


@dataclass(frozen=True, slots=True)
class Server:
    """What requests and replies depend on: the model, its tokenizer and its limits."""

    model: str
    context: int
    vocabulary: int
    eos: frozenset[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def vllm_generate(body: Body, server: Server) -> Job:
    """A body of vLLM's `/inference/v1/generate`."""
    params = _mapping(body, "sampling_params")
    _require_known(body, "model", "token_ids", "sampling_params")
    _require_known(params, *VLLM, "logprobs")
    ids = _ids(body.get("token_ids"), "token_ids", server)
    most = _most(params.get("max_tokens"), server.context, ids, server)
    return _job(ids, params, most, "seed", server, params.get("logprobs") is not None, _adapter(body, server))


def completions(body: Body, server: Server) -> Job:
    """A body of `/v1/completions`; its prompt is one list of token ids, or one text."""
    _require_known(body, "model", "prompt", *VLLM, "logprobs")
    prompt = body.get("prompt")
    ids = _ids(server.encode(prompt) if isinstance(prompt, str) else prompt, "prompt", server)
    most = _most(body.get("max_tokens"), 16, ids, server)
    return _job(ids, body, most, "seed", server, body.get("logprobs") is not None, _adapter(body, server))


def sglang(body: Body, server: Server) -> Job:
    """A body of SGLang's `/generate`."""
    params = _mapping(body, "sampling_params")
    _require_known(body, "text", "input_ids", "sampling_params", "return_logprob", "lora_path")
    _require_known(params, "max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", SG_SEED)
    text = body.get("text")
    ids = _ids(server.encode(text) if isinstance(text, str) else body.get("input_ids"), "input_ids", server)
    most = _most(params.get("max_new_tokens"), 128, ids, server)
    job = _job(ids, params, most, SG_SEED, server, bool(body.get("return_logprob")), body.get("lora_path"))
    # In SGLang, ignore_eos switches all stop ids off.
    return replace(job, stop_ids=frozenset()) if params.get("ignore_eos") else job


VLLM = ("max_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", "seed")
SG_SEED = "sampling_seed"


def vllm_generate_reply(job: Job, answer: Answer, _: Server) -> dict[str, Any]:
    """The reply of `/inference/v1/generate`."""
    segment = answer.segment
    content: list[dict[str, Any]] = [
        {"token_id": token, "token": f"token_id:{token}", "logprob": logprob, "rank": None, "top_logprobs": []}
        for token, logprob in zip(segment.tokens, segment.logprobs, strict=True)
    ]
    choice = {
        "index": 0,
        "logprobs": {"content": content} if job.logprobs else None,
        "finish_reason": _finish(job, answer),
        "token_ids": segment.tokens,
    }
    return {
        "request_id": secrets.token_hex(16),
        "choices": [choice],
        "prompt_logprobs": None,
        "kv_transfer_params": None,
        "usage": _usage(job, answer),
        "weight_version": answer.weights,
    }


def completions_reply(job: Job, answer: Answer, server: Server) -> dict[str, Any]:
    """The reply of `/v1/completions`, token ids included."""
    segment = answer.segment
    names = [f"token_id:{token}" for token in segment.tokens]
    texts = [server.decode([token]) for token in segment.tokens]
    logprobs = {
        "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        "token_logprobs": segment.logprobs,
        "tokens": names,
        "top_logprobs": [{name: value} for name, value in zip(names, segment.logprobs, strict=True)],
    }
    finish = _finish(job, answer)
    choice = {
        "index": 0,
        "text": server.decode(segment.tokens),
        "logprobs": logprobs if job.logprobs else None,
        "finish_reason": finish,
        "stop_reason": segment.tokens[-1] if finish == "stop" else None,
        "token_ids": segment.tokens,
        "prompt_token_ids": job.ids,
        "prompt_logprobs": None,
    }
    return {
        "id": f"cmpl-{secrets.token_hex(16)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": server.model,
        "choices": [choice],
        "usage": _usage(job, answer),
        "weight_version": answer.weights,
    }


def sglang_reply(job: Job, answer: Answer, server: Server) -> dict[str, Any]:
    """The reply of SGLang's `/generate`."""
    segment = answer.segment
    stopped = _finish(job, answer) == "stop"
    reason = (
        {"type": "stop", "matched": segment.tokens[-1]} if stopped else {"type": "length", "length": job.max_tokens}
    )
    meta: dict[str, Any] = {
        "id": secrets.token_hex(16),
        "finish_reason": reason,
        "prompt_tokens": len(job.ids),
        "completion_tokens": len(segment.tokens),
        "cached_tokens": answer.cached_tokens,
        "weight_version": answer.weights,
    }
    if job.logprobs:
        pairs = zip(segment.logprobs, segment.tokens, strict=True)
        meta |= {
            "input_token_logprobs": [],
            "output_token_logprobs": [[logprob, token, None] for logprob, token in pairs],
        }
    return {"text": server.decode(segment.tokens), "output_ids": segment.tokens, "meta_info": meta}


def adapter_of(body: Body) -> tuple[str, str | None]:
    """The name of an adapter, and its folder if there is one, in a body of `/load_lora_adapter` and similar paths."""
    name, folder = body.get("lora_name"), body.get("lora_path")
    if not isinstance(name, str) or not name or not isinstance(folder, str | None):
        raise BadRequestError("lora_name must be a name, and lora_path a folder.")
    return name, folder


def _adapter(body: Body, server: Server) -> str | None:
    """The adapter that a request to vLLM names: any name other than the model's."""
    name = body.get("model")
    return None if name in (None, server.model) else str(name)


def _job(
    ids: list[int],
    params: Body,
    max_tokens: Any,
    seed_key: str,
    server: Server,
    logprobs: bool,
    adapter: str | None,
) -> Job:
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise BadRequestError(f"max_tokens must be at least 1, got {max_tokens}.")
    if len(ids) + max_tokens > server.context:
        raise BadRequestError(
            f"This model's maximum context length is {server.context} tokens. However, you requested {max_tokens} "
            f"output tokens and your prompt contains {len(ids)} input tokens. Please reduce one or the other."
        )
    given = {key: params[key] for key in ("temperature", "top_p", "top_k") if params.get(key) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    try:
        sampling = Sampling(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequestError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r}.") from error
    seed = params.get(seed_key)
    if seed is not None and not (isinstance(seed, int) and -(1 << 63) <= seed < 1 << 63):
        raise BadRequestError(f"{seed_key} must be a 64-bit integer, got {seed!r}.")
    stops = params.get("stop_token_ids") or []
    own = frozenset(_ids(stops, "stop_token_ids", server)) if stops else frozenset()
    return Job(
        ids,
        max_tokens,
        secrets.randbits(63) if seed is None else seed,
        sampling,
        own if params.get("ignore_eos") else own | server.eos,
        logprobs,
        adapter,
    )


def _most(given: Any, default: int, ids: list[int], server: Server) -> Any:
    """`given`, or `default` cut to the room that the context has left."""
    return max(1, min(default, server.context - len(ids))) if given is None else given


def _ids(value: Any, name: str, server: Server) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise BadRequestError(f"{name} must be a list of token ids, of one request.")
    if unknown := [token for token in value if not 0 <= token < server.vocabulary]:
        raise BadRequestError(f"Token id {unknown[0]} is out of vocabulary.")
    return value


def _mapping(body: Body, name: str) -> Body:
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise BadRequestError(f"{name} must be an object.")
    return value


def _require_known(given: Body, *known: str) -> None:
    for key, value in given.items():
        if key in known or key in IGNORED:
            continue
        if key not in NEUTRAL:
            raise BadRequestError(f"{key}: unknown here.")
        if value not in NEUTRAL[key]:
            raise BadRequestError(f"{key}={value!r} is not supported.")


def _finish(job: Job, answer: Answer) -> str:
    return "stop" if answer.segment.tokens[-1] in job.stop_ids else "length"


def _usage(job: Job, answer: Answer) -> dict[str, Any]:
    made = len(answer.segment.tokens)
    return {
        "prompt_tokens": len(job.ids),
        "completion_tokens": made,
        "total_tokens": len(job.ids) + made,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def models(server: Server, adapter: str | None) -> dict[str, Any]:
    """The reply of `/v1/models`: the model, and then its `adapter` if it has one."""
    card = {"object": "model", "created": int(time.time()), "owned_by": "treepo", "max_model_len": server.context}
    cards = [{"id": server.model, **card, "root": server.model, "parent": None}]
    if adapter is not None:
        cards.append({"id": adapter, **card, "root": adapter, "parent": server.model})
    return {"object": "list", "data": cards}


def description(paths: Mapping[str, Collection[str]], version: str) -> dict[str, Any]:
    """An OpenAPI description of the paths alone; clients find out from it which dialects are served."""
    listed: dict[str, Any] = {
        path: {method.lower(): {"responses": {}} for method in methods} for path, methods in paths.items()
    }
    return {"openapi": "3.1.0", "info": {"title": "treepo serve", "version": version}, "paths": listed}
