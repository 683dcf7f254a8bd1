"""The wire protocols of inference servers: request bodies, replies, and how new weights are announced.

A server must send log-probs of the distribution that it samples from. docs/engines.md says how each server has to be
started for that. The probe of the weights (`engines.weight_check`) finds a server that was started otherwise, because
it samples at a temperature of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from treepo.engines import Sampling
from treepo.engines.open_trees import require_prompt_fits
from treepo.errors import EngineError
from treepo.tree import Tree

Json = Mapping[str, Any]
NOT_SENT = -9000.0  # vLLM writes -9999 where it has no log-prob


class TreeHandle(Protocol):
    """What the handles of servers and of vLLM have in common."""

    tree: Tree
    sampling: Sampling
    stop_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """A segment that is wanted."""

    tokens: list[int]  # the prefix
    max_tokens: int
    seed: int
    sampling: Sampling
    stop_ids: Collection[int]

    @classmethod
    def of(cls, handle: TreeHandle, node: int, max_tokens: int, seed: int, context: int) -> SegmentRequest:
        """The request for a segment after `node`; raises `EngineError` if it could exceed the `context` (tokens)."""
        tree = handle.tree
        request = cls(tree.tokens(node), max_tokens, seed, handle.sampling, handle.stop_ids)
        if len(request.tokens) + max_tokens > context:
            raise EngineError(
                f"tree {tree.key!r}: {len(request.tokens)} tokens of prefix and max_tokens={max_tokens} exceed the "
                f"context of {context}: lower the response budget"
            )
        return request


def require_answerable(tree: Tree, context: int, remedy: str, *, entropies: bool) -> None:
    """Raise `EngineError` for a tree that no inference server can grow; `remedy`: for a prompt that is too long."""
    if entropies:
        raise EngineError(
            "inference servers send no entropies: choose a sampler.branching that needs none, or the local engine"
        )
    require_prompt_fits(tree, context, remedy)


@dataclass(frozen=True, slots=True)
class SegmentReply:
    """The answer to a `SegmentRequest`, before it is checked."""

    tokens: list[int]
    logprobs: list[float]  # nats
    finish: str | None  # why the segment ended, in the server's words
    weights: str | None = None  # the server's name for its weights; None: it does not name them


class WireProtocol(Protocol):
    """One form of requests and replies; the setting `engine.dialect` chooses one by its `name`."""

    name: ClassVar[str]
    path: ClassVar[str]
    block: ClassVar[int]
    """Tokens per block of the prefix cache, unless the server was started with another size."""
    adapters: ClassVar[str]
    """The path before /load_lora_adapter."""

    def refusal(self, sampling: Sampling) -> str | None:
        """Why such a server cannot send the log-probs under `sampling`; None: it can."""
        ...

    def body(self, model: str, request: SegmentRequest, adapter: str | None = None) -> Json:
        """The JSON that asks for a segment of `model`, or of its `adapter`."""
        ...

    def read(self, reply: Any) -> SegmentReply:
        """The content of a reply; raises `LookupError`, `TypeError` or `ValueError` if it has another form."""
        ...


class VLLMGenerate:
    """vLLM's `/inference/v1/generate`: token ids in and out."""

    name: ClassVar[str] = "vllm"
    path: ClassVar[str] = "/inference/v1/generate"
    block: ClassVar[int] = 16
    adapters: ClassVar[str] = "/v1"

    def refusal(self, sampling: Sampling) -> str | None:
        return None

    def body(self, model: str, request: SegmentRequest, adapter: str | None = None) -> Json:
        params = {**vllm_sampling(request), "logprobs": 0, "detokenize": False}
        return {"model": adapter or model, "token_ids": request.tokens, "sampling_params": params, "stream": False}

    def read(self, reply: Any) -> SegmentReply:
        (choice,) = reply["choices"]
        logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        return SegmentReply(_ids(choice["token_ids"]), logprobs, choice["finish_reason"], reply.get("weight_version"))


class VLLMCompletions:
    """vLLM's `/v1/completions` with a prompt of token ids and `return_token_ids`."""

    name: ClassVar[str] = "completions"
    path: ClassVar[str] = "/v1/completions"
    block: ClassVar[int] = 16
    adapters: ClassVar[str] = "/v1"

    def refusal(self, sampling: Sampling) -> str | None:
        return None

    def body(self, model: str, request: SegmentRequest, adapter: str | None = None) -> Json:
        more = {"logprobs": 1, "return_token_ids": True, "skip_special_tokens": False, "stream": False}
        return {"model": adapter or model, "prompt": request.tokens, **vllm_sampling(request), **more}

    def read(self, reply: Any) -> SegmentReply:
        (choice,) = reply["choices"]
        if choice.get("token_ids") is None:
            raise LookupError("no token_ids: a server that does not know return_token_ids cannot be used")
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        return SegmentReply(_ids(choice["token_ids"]), logprobs, choice["finish_reason"], reply.get("weight_version"))


class SGLang:
    """SGLang's `/generate` with `input_ids`.

    Its log-probs are those after temperature, but before top-k and top-p. Where stop ids are given, the server's own
    EOS ids end a segment too, because `ignore_eos` would switch off both.
    """

    name: ClassVar[str] = "sglang"
    path: ClassVar[str] = "/generate"
    block: ClassVar[int] = 1
    adapters: ClassVar[str] = ""

    def refusal(self, sampling: Sampling) -> str | None:
        if sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1):
            return "SGLang's log-probs are those before top_k and top_p: set top_k 0 and top_p 1, or use vLLM"
        return None

    def body(self, model: str, request: SegmentRequest, adapter: str | None = None) -> Json:
        sampling = request.sampling
        params = {
            "n": 1,
            "max_new_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": request.seed & 0x7FFFFFFF,  # 31 bits; used under --enable-deterministic-inference only
            "stop_token_ids": sorted(request.stop_ids),
            "ignore_eos": not request.stop_ids,
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        more = {"return_logprob": True, "logprob_start_len": -1, "stream": False}
        chosen = {} if adapter is None else {"lora_path": adapter}  # SGLang's key for the name of an adapter
        return {"input_ids": request.tokens, "sampling_params": params, **more, **chosen}

    def read(self, reply: Any) -> SegmentReply:
        meta = reply["meta_info"]
        # These entries hold every token that was sampled. `output_ids` may lack the one that ended the segment.
        entries = meta["output_token_logprobs"]
        finish = meta["finish_reason"]
        kind = finish["type"] if isinstance(finish, dict) else finish
        logprobs = [float(entry[0]) for entry in entries]
        return SegmentReply(_ids(entry[1] for entry in entries), logprobs, kind, meta.get("weight_version"))


# The best first. SGLang also has a /v1/completions, but there nobody can tell what its log-probs are under top-p.
WIRE_PROTOCOLS: dict[str, WireProtocol] = {p.name: p for p in (VLLMGenerate(), SGLang(), VLLMCompletions())}


def recognised(paths: Collection[str]) -> WireProtocol | None:
    """The best wire protocol of a server that has `paths`; None: it has none that we know."""
    return next((protocol for protocol in WIRE_PROTOCOLS.values() if protocol.path in paths), None)


def checked(request: SegmentRequest, reply: SegmentReply) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of a reply that fits its request; raises `EngineError` for any other.

    Tokens after a stop id are dropped. A greedy segment is drawn from point masses, so its log-probs are 0, whatever
    the server sends.
    """
    tokens, logprobs = reply.tokens, reply.logprobs
    if reply.finish in ("abort", "error"):
        raise EngineError(f"the server gave the request up ({reply.finish})")
    if not tokens or len(tokens) > request.max_tokens:
        raise EngineError(f"the server sent {len(tokens)} tokens where 1 to {request.max_tokens} were asked for")
    if len(tokens) != len(logprobs):
        raise EngineError(f"the server sent {len(tokens)} tokens with {len(logprobs)} log-probs")
    end = next((i + 1 for i, token in enumerate(tokens) if token in request.stop_ids), len(tokens))
    tokens, logprobs = tokens[:end], logprobs[:end]
    if request.sampling.temperature == 0:
        return tokens, [0.0] * len(tokens)
    for token, logprob in zip(tokens, logprobs, strict=True):
        if not math.isfinite(logprob) or logprob < NOT_SENT:
            raise EngineError(f"the server sent {logprob} as log-prob of token {token}: did the last update diverge?")
    return tokens, logprobs


# New weights ------------------------------------------------------------------------------------------------------


class WeightUpdate(Protocol):
    """How a server is told to load weights from a folder."""

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        """Requests to post one after the other: path, body, and whether a refusal is an error.

        `adapter`: the name of the weights, if they are an adapter; later requests use it. `last`: the name of the
        adapter before. After these requests the server no longer answers from a cache of other weights.
        """
        ...


class FromDisk:
    """`/update_weights_from_disk` of SGLang and `treepo serve`; it also empties the cache."""

    path: ClassVar[str] = "/update_weights_from_disk"

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        return [(self.path, {"model_path": folder, "weight_version": folder, "flush_cache": True}, True)]


class CollectiveRPC:
    """`/collective_rpc` of vLLM, which is there under VLLM_SERVER_DEV_MODE=1."""

    path: ClassVar[str] = "/collective_rpc"

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        return [(self.path, reload, True), ("/reset_prefix_cache", {}, True)]


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """`/load_lora_adapter` of SGLang, and `/v1/load_lora_adapter` of vLLM; `treepo serve` has both.

    Their caches keep the key-values of different adapters apart, so nothing has to be emptied.
    """

    prefix: str

    @property
    def path(self) -> str:
        """The path of a server that takes adapters."""
        return f"{self.prefix}/load_lora_adapter"

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        # The server may already have an adapter of this name: from an earlier run, or because a connection broke.
        gone = [name for name in dict.fromkeys((last, adapter)) if name is not None]
        unload = [(f"{self.prefix}/unload_lora_adapter", {"lora_name": name}, False) for name in gone]
        return [*unload, (self.path, {"lora_name": adapter, "lora_path": folder}, True)]


def update_of(
    paths: Collection[str], protocol: WireProtocol | None = None, *, adapters: bool = False
) -> WeightUpdate | None:
    """How a server that has `paths` takes new weights, or new adapters if `adapters`; None: it takes none."""
    if adapters:
        load = LoadAdapter(protocol.adapters if protocol is not None else "")
        return load if load.path in paths else None
    if FromDisk.path in paths:
        return FromDisk()
    return CollectiveRPC() if CollectiveRPC.path in paths else None


def vllm_sampling(request: SegmentRequest) -> dict[str, Any]:
    """The sampling parameters of a request to vLLM.

    All of them are set, because vLLM takes a missing one from the model's generation_config.json.
    """
    sampling = request.sampling
    return {
        "n": 1,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(request.stop_ids),
        "ignore_eos": True,  # only `stop_ids` end a segment
    }


def _ids(values: Any) -> list[int]:
    return [int(value) for value in values]
