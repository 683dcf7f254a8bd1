"""How inference servers are spoken to: request bodies, replies, and how new weights are announced.

A server must send log-probs of the distribution that it samples from. What each one has to be started with for that is
in docs/engines.md; the probe of the weights (`engines.probe`) samples at a temperature of its own and so finds a server
that does not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from treepo.engines import Sampling
from treepo.errors import EngineError
from treepo.tree import Tree

Json = Mapping[str, Any]
NOT_SENT = -9000.0  # vLLM writes -9999 where it has no log-prob


@dataclass(frozen=True, slots=True)
class Ask:
    """A segment that is wanted."""

    tokens: list[int]  # the prefix
    max_tokens: int
    seed: int
    sampling: Sampling
    stop_ids: Collection[int]

    @classmethod
    def of(cls, handle: Asking, node: int, max_tokens: int, seed: int, context: int) -> Ask:
        """The segment after `node` of a handle's tree; raises `EngineError` if it could exceed the `context`."""
        tree = handle.tree
        ask = cls(tree.tokens(node), max_tokens, seed, handle.sampling, handle.stop_ids)
        if len(ask.tokens) + max_tokens > context:
            raise EngineError(
                f"tree {tree.key!r}: {len(ask.tokens)} tokens of prefix and max_tokens={max_tokens} exceed the "
                f"context of {context}: lower the response budget"
            )
        return ask


class Asking(Protocol):
    """What the handles of all engines of this kind know."""

    tree: Tree
    sampling: Sampling
    stop_ids: frozenset[int]


def require_answerable(tree: Tree, context: int, remedy: str, *, entropies: bool) -> None:
    """Raise `EngineError` for a tree that no inference server can grow; `remedy`: for a prompt that is too long."""
    if entropies:
        raise EngineError(
            "inference servers send no entropies: choose a sampler.branching that needs none, or the local engine"
        )
    if len(tree.prompt) >= context:
        raise EngineError(
            f"the prompt of tree {tree.key!r} has {len(tree.prompt)} tokens, and prompt and response share {context}: "
            f"drop the problem, or {remedy}"
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server sent, as it came."""

    tokens: list[int]
    logprobs: list[float]
    finish: str | None
    weights: str | None = None  # what it says that it decodes with; None: it does not say


class Dialect(Protocol):
    """One form of requests and replies."""

    name: ClassVar[str]
    path: ClassVar[str]
    block: ClassVar[int]
    """Tokens per block of the prefix cache, unless the server was told otherwise."""
    adapters: ClassVar[str]
    """What stands before /load_lora_adapter."""

    def refusal(self, sampling: Sampling) -> str | None:
        """Why log-probs under `sampling` cannot be had from such a server; None: they can."""
        ...

    def body(self, model: str, ask: Ask, adapter: str | None = None) -> Json:
        """The JSON that asks for a segment of `model`, or of its `adapter`."""
        ...

    def read(self, reply: Any) -> Reply:
        """What a reply says; raises `LookupError`, `TypeError` or `ValueError` if it has another form."""
        ...


class VLLMGenerate:
    """vLLM's `/inference/v1/generate`: token ids in and out."""

    name: ClassVar[str] = "vllm"
    path: ClassVar[str] = "/inference/v1/generate"
    block: ClassVar[int] = 16
    adapters: ClassVar[str] = "/v1"

    def refusal(self, sampling: Sampling) -> str | None:
        return None

    def body(self, model: str, ask: Ask, adapter: str | None = None) -> Json:
        params = {**vllm_sampling(ask), "logprobs": 0, "detokenize": False}
        return {"model": adapter or model, "token_ids": ask.tokens, "sampling_params": params, "stream": False}

    def read(self, reply: Any) -> Reply:
        (choice,) = reply["choices"]
        logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        return Reply(_ids(choice["token_ids"]), logprobs, choice["finish_reason"], reply.get("weight_version"))


class VLLMCompletions:
    """vLLM's `/v1/completions` with a prompt of token ids and `return_token_ids`."""

    name: ClassVar[str] = "completions"
    path: ClassVar[str] = "/v1/completions"
    block: ClassVar[int] = 16
    adapters: ClassVar[str] = "/v1"

    def refusal(self, sampling: Sampling) -> str | None:
        return None

    def body(self, model: str, ask: Ask, adapter: str | None = None) -> Json:
        more = {"logprobs": 1, "return_token_ids": True, "skip_special_tokens": False, "stream": False}
        return {"model": adapter or model, "prompt": ask.tokens, **vllm_sampling(ask), **more}

    def read(self, reply: Any) -> Reply:
        (choice,) = reply["choices"]
        if choice.get("token_ids") is None:
            raise LookupError("no token_ids: a server that does not know return_token_ids cannot be used")
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        return Reply(_ids(choice["token_ids"]), logprobs, choice["finish_reason"], reply.get("weight_version"))


class SGLang:
    """SGLang's `/generate` with `input_ids`.

    Its log-probs are those after temperature, but before top-k and top-p. Where stop ids are given, its own EOS ids end
    a segment too: `ignore_eos` would switch off both.
    """

    name: ClassVar[str] = "sglang"
    path: ClassVar[str] = "/generate"
    block: ClassVar[int] = 1
    adapters: ClassVar[str] = ""

    def refusal(self, sampling: Sampling) -> str | None:
        if sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1):
            return "SGLang's log-probs are those before top_k and top_p: set top_k 0 and top_p 1, or use vLLM"
        return None

    def body(self, model: str, ask: Ask, adapter: str | None = None) -> Json:
        sampling = ask.sampling
        params = {
            "n": 1,
            "max_new_tokens": ask.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": ask.seed & 0x7FFFFFFF,  # 31 bits there; heeded under --enable-deterministic-inference
            "stop_token_ids": sorted(ask.stop_ids),
            "ignore_eos": not ask.stop_ids,
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        more = {"return_logprob": True, "logprob_start_len": -1, "stream": False}
        chosen = {} if adapter is None else {"lora_path": adapter}  # which is an adapter's name there
        return {"input_ids": ask.tokens, "sampling_params": params, **more, **chosen}

    def read(self, reply: Any) -> Reply:
        meta = reply["meta_info"]
        # Not `output_ids`: these entries hold every token that was sampled, the one that ended the segment included.
        entries = meta["output_token_logprobs"]
        finish = meta["finish_reason"]
        kind = finish["type"] if isinstance(finish, dict) else finish
        logprobs = [float(entry[0]) for entry in entries]
        return Reply(_ids(entry[1] for entry in entries), logprobs, kind, meta.get("weight_version"))


# The best first. SGLang has a /v1/completions, too, of which it cannot be said what its log-probs are under top-p.
DIALECTS: dict[str, Dialect] = {d.name: d for d in (VLLMGenerate(), SGLang(), VLLMCompletions())}


def recognised(paths: Collection[str]) -> Dialect | None:
    """The best dialect of a server that has `paths`; None: it has none that we speak."""
    return next((dialect for dialect in DIALECTS.values() if dialect.path in paths), None)


def checked(ask: Ask, reply: Reply) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of a segment that is what was asked for, a stop id being the last; else `EngineError`.

    A greedy segment is sampled from point masses: its log-probs are 0, whatever the server says.
    """
    tokens, logprobs = reply.tokens, reply.logprobs
    if reply.finish in ("abort", "error"):
        raise EngineError(f"the server gave the request up ({reply.finish})")
    if not tokens or len(tokens) > ask.max_tokens:
        raise EngineError(f"the server sent {len(tokens)} tokens where 1 to {ask.max_tokens} were asked for")
    if len(tokens) != len(logprobs):
        raise EngineError(f"the server sent {len(tokens)} tokens with {len(logprobs)} log-probs")
    end = next((i + 1 for i, token in enumerate(tokens) if token in ask.stop_ids), len(tokens))
    tokens, logprobs = tokens[:end], logprobs[:end]
    if ask.sampling.temperature == 0:
        return tokens, [0.0] * len(tokens)
    for token, logprob in zip(tokens, logprobs, strict=True):
        if not math.isfinite(logprob) or logprob < NOT_SENT:
            raise EngineError(f"the server sent {logprob} as log-prob of token {token}: did the last update diverge?")
    return tokens, logprobs


# New weights ------------------------------------------------------------------------------------------------------


class Update(Protocol):
    """How a server is told to load weights from a folder."""

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        """Paths and bodies, to be posted one after the other, and whether it matters that the server refuses.

        `adapter`: the name that the weights will be asked for by, where they are an adapter; `last`: that of the one
        before. Nothing that is computed afterwards comes from a cache of other weights.
        """
        ...


class FromDisk:
    """`/update_weights_from_disk` of SGLang and `treepo serve`; it empties the cache, too."""

    path: ClassVar[str] = "/update_weights_from_disk"

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        return [(self.path, {"model_path": folder, "weight_version": folder, "flush_cache": True}, True)]


class CollectiveRPC:
    """vLLM's `/collective_rpc`, which it has under VLLM_SERVER_DEV_MODE=1."""

    path: ClassVar[str] = "/collective_rpc"

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        return [(self.path, reload, True), ("/reset_prefix_cache", {}, True)]


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """`/load_lora_adapter` of SGLang and, below `/v1`, of vLLM; `treepo serve` has both.

    The caches of all of them tell adapters apart.
    """

    prefix: str

    @property
    def path(self) -> str:
        """Where a server that takes adapters takes them."""
        return f"{self.prefix}/load_lora_adapter"

    def requests(self, folder: str, adapter: str | None, last: str | None) -> list[tuple[str, Json, bool]]:
        # One of this name may be there: from a run before, or from before a connection broke.
        gone = [name for name in dict.fromkeys((last, adapter)) if name is not None]
        unload = [(f"{self.prefix}/unload_lora_adapter", {"lora_name": name}, False) for name in gone]
        return [*unload, (self.path, {"lora_name": adapter, "lora_path": folder}, True)]


def update_of(paths: Collection[str], dialect: Dialect | None = None, *, adapters: bool = False) -> Update | None:
    """How a server that has `paths` takes new weights, or `adapters`; None: it does not."""
    if adapters:
        load = LoadAdapter(dialect.adapters if dialect is not None else "")
        return load if load.path in paths else None
    if FromDisk.path in paths:
        return FromDisk()
    return CollectiveRPC() if CollectiveRPC.path in paths else None


def vllm_sampling(ask: Ask) -> dict[str, Any]:
    """Everything is said, for what is not is taken from the model's generation_config.json."""
    sampling = ask.sampling
    return {
        "n": 1,
        "max_tokens": ask.max_tokens,
        "seed": ask.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(ask.stop_ids),
        "ignore_eos": True,  # only `stop_ids` end a segment
    }


def _ids(values: Any) -> list[int]:
    return [int(value) for value in values]
