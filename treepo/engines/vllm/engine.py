"""vLLM in this process: its AsyncLLM, token ids in and out, weights or an adapter loaded after every update.

vLLM keeps the key-values of whole blocks of a prefix. Siblings, later segments and fallbacks reuse them, and we need do
nothing for that. Weights go by vLLM's own transfer (`engines.vllm.transfer`) or through a folder, and a probe
(`engines.weight_check`) shows that they have arrived.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel

from treepo.engines import Sampling, Segment
from treepo.engines.open_trees import OpenTrees
from treepo.engines.remote.protocols import SegmentReply, SegmentRequest, checked, require_answerable, vllm_sampling
from treepo.engines.settings import VLLMSettings
from treepo.engines.vllm.transfer import Transfer, backend
from treepo.engines.weight_check import SAMPLING, WeightGuard
from treepo.engines.weight_files import WeightSource
from treepo.errors import ConfigError, EngineError
from treepo.models import causal_lm, lora
from treepo.tree import Tree

log = logging.getLogger(__name__)


@dataclass(slots=True)
class VLLMStats:
    """Counts of what vLLM was asked for; a new object starts at zero."""

    requests: int = 0
    prefix_tokens: int = 0  # of all requests
    cached_tokens: int = 0  # of those, found in the prefix cache
    generated_tokens: int = 0

    @property
    def computed_again(self) -> int:
        """Prefix tokens that were not in the cache: each prompt once, and the tokens that filled no block."""
        return self.prefix_tokens - self.cached_tokens


class VLLMHandle:
    """One tree of a `VLLMEngine`."""

    def __init__(self, engine: VLLMEngine, tree: Tree, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._engine, self.tree, self.sampling, self.stop_ids = engine, tree, sampling, stop_ids

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """Continue the prefix that ends with `node`; see `Handle`. A cancelled request ends in vLLM, too."""
        request = SegmentRequest.of(self, node, max_tokens, seed, self._engine.context)
        return Segment(*checked(request, await self._engine._ask(request)), self._engine.version)

    def close(self) -> None:
        """The prefix cache forgets the tree by itself."""
        self._engine._open.discard(self)


class VLLMEngine(WeightGuard):
    """Decodes on vLLM in this process, with copies of `model`'s weights that go through `folder`."""

    def __init__(self, model: PreTrainedModel, settings: VLLMSettings, folder: str | Path) -> None:
        super().__init__("vLLM", WeightSource(model, folder), settings.tolerance)
        self._model, self._settings = model, settings
        self._updated = False  # `load_weights` was called
        self._adapter: Any = None  # vLLM's LoRARequest for the adapter that it has
        self._adapters = count(1)
        self._transfer: Transfer | None = None  # None: weights go through `folder`
        self.llm: Any = None  # vLLM's AsyncLLM; None: not started
        self._open = OpenTrees[VLLMHandle]()
        self._numbers = count()
        self.context = min(causal_lm.context(model), settings.max_model_len or causal_lm.context(model))
        self.tree_tokens = 1 << 60  # vLLM computes again what its cache has no room for
        self.granularity = settings.block_tokens or 1
        self.stats = VLLMStats()

    @property
    def version(self) -> int:
        """The version of the weights that segments come from."""
        return self.source.version

    async def start(self) -> None:
        """Start vLLM with the weights of the model, which takes half a minute to several minutes.

        Raises `ConfigError` if vLLM is not installed or refuses the settings.
        """
        if self.llm is not None:
            return
        # Else every reload fills its log. It reads this variable when it is imported.
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
            # A handle of GPU memory cannot be sent as plain data. It goes to vLLM's own process only.
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
            # vLLM dies of a prefill in parts if requests have seeds, because a CPU's generator cannot be set back.
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
        """A handle for `tree`; waits until vLLM was seen to decode with the model's weights."""
        require_answerable(tree, self.context, "raise engine.max_model_len", entropies=entropies)
        await self.start()
        await self.make_ready()
        return self._open.add(VLLMHandle(self, tree, sampling, frozenset(stop_ids)))

    async def load_weights(self, version: int) -> None:
        """Have vLLM load the model's weights, and compare what it then samples with the model here.

        Raises `EngineError` if vLLM decodes with other weights.
        """
        self._open.require_none()
        await self.start()
        self.source.version, self.holds, self._updated = version, None, True
        await self.make_ready()

    async def close(self) -> None:
        """End vLLM's processes."""
        if self.llm is not None:
            self.llm.shutdown()
            self.llm = None

    async def _ask(self, request: SegmentRequest) -> SegmentReply:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(
            **vllm_sampling(request), logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        number = f"treepo-{next(self._numbers)}"
        try:
            prompt = TokensPrompt(prompt_token_ids=request.tokens)
            async for last in self.llm.generate(prompt, params, number, lora_request=self._adapter):
                output = last
        except EngineDeadError as error:
            raise EngineError(f"vLLM has died: {error}; what it last said is above") from error
        except (EngineGenerateError, ValueError) as error:
            raise EngineError(f"vLLM does not answer: {error}") from error
        (found,) = output.outputs
        self.stats.requests += 1
        self.stats.prefix_tokens += len(request.tokens)
        self.stats.cached_tokens += output.num_cached_tokens or 0
        self.stats.generated_tokens += len(found.token_ids)
        logprobs = [at[token].logprob for token, at in zip(found.token_ids, found.logprobs or [], strict=False)]
        return SegmentReply(list(found.token_ids), logprobs, found.finish_reason)

    # Weights -------------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        old, self.source.path = self.source.path, None
        if self._transfer is not None:
            try:
                await self._transfer.send()
            except EngineError as error:
                self._send_no_more(str(error))
        if self._transfer is None:
            path = self._write()
            try:
                if lora.adapted(self._model):
                    await self._load_adapter(path)
                else:
                    await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            except Exception as error:  # an error of a worker arrives as a bare Exception
                raise EngineError(f"vLLM cannot load version {self.version} of the weights: {error}") from error
        if not await self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not empty its prefix cache after an update: requests are still under way")
        self.source.drop(old)

    def _probe_handle(self, tree: Tree) -> VLLMHandle:
        return VLLMHandle(self, tree, SAMPLING, frozenset())

    def _due(self) -> bool:
        return self._updated

    def _has_another_way(self, why: str) -> bool:
        if self._transfer is None:
            return False
        self._send_no_more(why)
        return True

    def _send_no_more(self, why: str) -> None:
        self._transfer = None
        log.warning(
            "vLLM's own transfer of weights failed (%s): they go through %s from now on", why, self.source.folder
        )

    async def _load_adapter(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        # vLLM's prefix cache tells adapters apart by name and path, its workers by the number.
        adapter = LoRARequest(lora.name_of(self._model), next(self._adapters), str(folder))
        if self._adapter is not None:
            await self.llm.remove_lora(self._adapter.lora_int_id)
        await self.llm.add_lora(adapter)
        self._adapter = adapter

    def _first(self) -> dict[str, Any]:
        """The model that vLLM starts with: the model's weights, or the base model if an adapter is trained."""
        if not lora.adapted(self._model):
            return {"model": str(self._write())}
        from vllm.config.lora import MaxLoRARanks

        adapter = lora.settings_of(self._model)
        rank = min((rank for rank in get_args(MaxLoRARanks) if rank >= adapter.r), default=adapter.r)
        return {"model": adapter.base_model_name_or_path, "enable_lora": True, "max_lora_rank": rank}

    def _write(self) -> Path:
        from vllm.platforms import current_platform

        # On CPUs vLLM packs the output layer. A reload of a tied one would leave the packed copy as it was.
        self.source.write(untied=current_platform.is_cpu())
        if self.source.path is None:
            raise RuntimeError("this process does not write the weights of its own vLLM")
        return self.source.path
