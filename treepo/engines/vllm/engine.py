"""vLLM in this process: its AsyncLLM, token ids in and out, weights or an adapter loaded after every update.

vLLM keeps key-values of whole blocks of a prefix, whoever computed them: siblings, later segments and fallbacks reuse
them without our doing. Weights go by vLLM's own transfer (`engines.transfer`) or through a folder, and a probe
(`engines.probe`) shows that they have arrived.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel

from treepo.engines import Sampling, Segment
from treepo.engines.remote.protocols import Ask, Reply, checked, require_answerable, vllm_sampling
from treepo.engines.settings import VLLMSettings
from treepo.engines.vllm.transfer import Transfer, backend
from treepo.engines.weight_check import SAMPLING, Probe, mismatch, probe, probe_tree
from treepo.engines.weight_files import save
from treepo.errors import ConfigError, EngineError
from treepo.models import causal_lm, lora
from treepo.tree import Tree

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Stats:
    """What was asked of vLLM since the last reset."""

    requests: int = 0
    prefix_tokens: int = 0  # of all requests
    cached_tokens: int = 0  # of those, found in the prefix cache
    generated_tokens: int = 0

    @property
    def computed_again(self) -> int:
        """Prefix tokens that were not in the cache: each prompt once, and what blocks did not hold."""
        return self.prefix_tokens - self.cached_tokens


class VLLMHandle:
    """One tree of a `VLLMEngine`."""

    def __init__(self, engine: VLLMEngine, tree: Tree, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._engine, self.tree, self.sampling, self.stop_ids = engine, tree, sampling, stop_ids

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """Continue the prefix that ends with `node`; see `Handle`. Cancelled, vLLM gives the request up, too."""
        ask = Ask.of(self, node, max_tokens, seed, self._engine.context)
        return Segment(*checked(ask, await self._engine._ask(ask)), self._engine.version)

    def close(self) -> None:
        """The prefix cache forgets the tree by itself."""
        self._engine._handles.discard(self)


class VLLMEngine:
    """Decodes on vLLM in this process, with copies of `model`'s weights that go through `folder`."""

    def __init__(self, model: PreTrainedModel, settings: VLLMSettings, folder: str | Path) -> None:
        self._model, self._settings = model, settings
        self._folder = Path(folder).expanduser().absolute()
        self._weights: Path | None = None  # where vLLM has read them last
        self._adapter: Any = None  # vLLM's LoRARequest, if those are an adapter
        self._adapters = count(1)
        self._transfer: Transfer | None = None  # None: weights go through `folder`
        self.llm: Any = None  # vLLM's AsyncLLM, once it was started
        self._handles: set[VLLMHandle] = set()
        self._numbers = count()
        self._lock = asyncio.Lock()  # of whoever sees to the weights
        self._holds: int | None = None  # the version that it was seen to decode with
        self._probed: Probe | None = None
        self.context = min(causal_lm.context(model), settings.max_model_len or causal_lm.context(model))
        self.tree_tokens = 1 << 60  # what does not fit its cache is computed again
        self.granularity = settings.block_tokens or 1
        self.version = 0
        self.stats = Stats()

    async def start(self) -> None:
        """Start vLLM with the weights of the model; takes from half a minute to minutes.

        Raises `ConfigError` if vLLM is not there or refuses the settings.
        """
        if self.llm is not None:
            return
        # Every reload is a page of its log, and one of its progress bars. It reads this when it is imported.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ConfigError(
                f"engine.kind=vllm: vLLM cannot be imported ({error}): `make venv-vllm`, or `pip install vllm` in an "
                "environment of its own with treepo"
            ) from error
        how = backend(self._model, self._settings)
        if how is not None:
            # The handles of memory on a GPU are no plain data. They go to vLLM's own process, and to no other.
            os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        cpu = current_platform.is_cpu()
        # On CPUs vLLM's own default of 128 recomputes more than it saves at segments of 64.
        self.granularity = self._settings.block_tokens or (32 if cpu else 16)
        settings = self._settings
        given: dict[str, Any] = {
            **self._first(),
            "skip_tokenizer_init": True,
            "dtype": settings.dtype if settings.dtype != "auto" else str(self._model.dtype).removeprefix("torch."),
            "max_model_len": self.context,
            "max_num_seqs": settings.max_num_seqs,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "enforce_eager": settings.enforce_eager,
            "block_size": self.granularity,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "weight_transfer_config": None if how is None else {"backend": how.backend},
        }
        if cpu:
            # Of a prefill in parts it dies where requests have seeds: a CPU's generator cannot be set back.
            given |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(self.context, 2048)}
        log.warning("engine: vLLM starts, which takes a while; VLLM_LOGGING_LEVEL=INFO shows what it does")
        try:
            self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**given | settings.args))
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"engine.kind=vllm: vLLM does not start: {error}") from error
        self._transfer = None if how is None else Transfer(self.llm, self._model, how)

    async def open(
        self,
        tree: Tree,
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None = None,
        *,
        entropies: bool = False,
    ) -> VLLMHandle:
        """A handle for `tree`, once vLLM was seen to decode with the model's weights."""
        require_answerable(tree, self.context, "raise engine.max_model_len", entropies=entropies)
        await self.start()
        await self._make_ready()
        handle = VLLMHandle(self, tree, sampling, frozenset(stop_ids))
        self._handles.add(handle)
        return handle

    async def load_weights(self, version: int) -> None:
        """Have vLLM load the model's weights, and compare what it then samples with the model here.

        Raises `EngineError` if it decodes with others.
        """
        if self._handles:
            raise RuntimeError(f"{len(self._handles)} trees are open: close them before the weights change")
        await self.start()
        self.version, self._holds = version, None
        async with self._lock:
            await self._reload()
        await self._make_ready()

    async def close(self) -> None:
        """End vLLM's processes."""
        if self.llm is not None:
            self.llm.shutdown()
            self.llm = None

    async def _ask(self, ask: Ask) -> Reply:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(
            **vllm_sampling(ask), logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        number = f"treepo-{next(self._numbers)}"
        try:
            prompt = TokensPrompt(prompt_token_ids=ask.tokens)
            async for last in self.llm.generate(prompt, params, number, lora_request=self._adapter):
                output = last
        except EngineDeadError as error:
            raise EngineError(f"vLLM has died: {error}; what it last said is above") from error
        except (EngineGenerateError, ValueError) as error:
            raise EngineError(f"vLLM does not answer: {error}") from error
        (found,) = output.outputs
        self.stats.requests += 1
        self.stats.prefix_tokens += len(ask.tokens)
        self.stats.cached_tokens += output.num_cached_tokens or 0
        self.stats.generated_tokens += len(found.token_ids)
        logprobs = [at[token].logprob for token, at in zip(found.token_ids, found.logprobs or [], strict=False)]
        return Reply(list(found.token_ids), logprobs, found.finish_reason)

    # Weights -------------------------------------------------------------------------------------------------------

    async def _make_ready(self) -> None:
        """See to it that vLLM decodes with the model's weights; it may have been started with earlier ones."""
        async with self._lock:
            if self._holds == self.version:
                return
            before, tolerance = self._probed, self._settings.tolerance
            found = await self._probe()
            if found.difference > tolerance and before is None:  # the model was warmed up or resumed meanwhile
                before = found
                await self._reload()
                found = await self._probe()
            why = mismatch(found, before, tolerance)
            if why and self._transfer is not None:
                self._send_no_more(why)
                await self._reload()
                why = mismatch(await self._probe(), before, tolerance)
            if why:
                raise EngineError(f"vLLM, version {self.version} of the weights: {why}")
            self._holds = self.version

    async def _reload(self) -> None:
        old, self._weights = self._weights, None
        if self._transfer is not None:
            try:
                await self._transfer.send()
            except EngineError as error:
                self._send_no_more(str(error))
        if self._transfer is None:
            self._weights = self._save()
            try:
                if lora.adapted(self._model):
                    await self._load_adapter(self._weights)
                else:
                    await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self._weights)})
            except Exception as error:  # whatever a worker raised arrives as a bare Exception
                raise EngineError(f"vLLM cannot load version {self.version} of the weights: {error}") from error
        if not await self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not empty its prefix cache after an update: requests are still under way")
        if old is not None and old != self._weights:
            shutil.rmtree(old, ignore_errors=True)

    def _send_no_more(self, why: str) -> None:
        self._transfer = None
        log.warning("vLLM's own transfer of weights failed (%s): they go through %s from now on", why, self._folder)

    async def _load_adapter(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        # vLLM's prefix cache goes by name and path, and its workers by the number.
        adapter = LoRARequest(lora.name_of(self._model), next(self._adapters), str(folder))
        if self._adapter is not None:
            await self.llm.remove_lora(self._adapter.lora_int_id)
        await self.llm.add_lora(adapter)
        self._adapter = adapter

    def _first(self) -> dict[str, Any]:
        """What vLLM starts with: the model's weights, or, where an adapter is trained, those that it belongs to."""
        if not lora.adapted(self._model):
            self._weights = self._save()
            return {"model": str(self._weights)}
        from vllm.config.lora import MaxLoRARanks

        adapter = lora.settings_of(self._model)
        rank = min((rank for rank in get_args(MaxLoRARanks) if rank >= adapter.r), default=adapter.r)
        return {"model": adapter.base_model_name_or_path, "enable_lora": True, "max_lora_rank": rank}

    async def _probe(self) -> Probe:
        tree = probe_tree(self._model)
        self._probed = await probe(VLLMHandle(self, tree, SAMPLING, frozenset()), tree, self._model)
        return self._probed

    def _save(self) -> Path:
        from vllm.platforms import current_platform

        # On CPUs it packs the output layer, and would go on with the old one: only a matrix of its own is loaded anew.
        return save(self._model, self._folder, self.version, untied=current_platform.is_cpu())
