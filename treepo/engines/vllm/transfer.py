"""vLLM's own transfer of weights: its worker reads the trained tensors on the GPU that both share, without a folder.

The parts are vLLM's (`vllm.distributed.weight_transfer`, 0.32); this module connects them to its AsyncLLM. Only
CUDA has such a transfer. The probe (`engines.weight_check`) shows whether the weights arrived.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import torch
from transformers import PreTrainedModel

from treepo.engines.settings import VLLMSettings
from treepo.errors import EngineError
from treepo.models import lora


def backend(model: PreTrainedModel, settings: VLLMSettings) -> Any:
    """How the weights of `model` reach a vLLM with `settings` (a `TrainerInitInfo`); None: through a folder."""
    shared = model.device.type == "cuda" and settings.tensor_parallel_size == 1 and not _several_processes()
    if settings.transfer == "folder" or not shared or lora.adapted(model):
        return None
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=0, packed=True)  # packed: a buffer at a time


def _several_processes() -> bool:
    """Whether other processes train, too. Each would have to send to a vLLM on its own GPU, at the same time."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Transfer:
    """Sends the weights of `model` to `llm`, a running AsyncLLM, in the way `how`, which `backend` gives."""

    def __init__(self, llm: Any, model: PreTrainedModel, how: Any) -> None:
        self._llm, self._model, self._how = llm, model, how
        self._trainer: Any = None  # vLLM's object for our side; None: not made yet

    async def send(self) -> None:
        """Have vLLM take the weights as they are now; raises `EngineError` if it does not."""
        try:
            # vLLM's code on this side blocks until its worker answers, and the answers come through the event loop.
            await asyncio.to_thread(self._send, _Client(self._llm, asyncio.get_running_loop()))
        except Exception as error:  # an error of a worker arrives as a bare Exception
            raise EngineError(str(error)) from error

    def _send(self, client: _Client) -> None:
        from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory

        # A new thread starts on the first GPU, and the model may be on another one.
        with torch.cuda.device_of(next(self._model.parameters())):  # type: ignore[no-untyped-call]
            if self._trainer is None:
                source = ModuleSource(self._model)
                self._trainer = WeightTransferTrainerFactory.trainer_init(self._how, client=client, source=source)
            self._trainer.client = client
            self._trainer.send_weights()


class _Client:
    """vLLM's `VLLMWeightSyncClient` for an AsyncLLM in this process: called in a thread, carried out in the loop."""

    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._llm, self._loop = llm, loop

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._wait_for(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    def start_weight_update(self) -> None:
        self._wait_for(self._llm.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._wait_for(self._llm.update_weights(WeightTransferUpdateRequest(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait_for(self._llm.finish_weight_update(weight_version))

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()
