"""A transfer of weights that works on CPUs. It uses vLLM's interface for other people's transfers, and sends one file.

With it, `treepo.engines.vllm.transfer` can be tested without a GPU. Two processes import this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load_file, save_file
from vllm.distributed.weight_transfer import (
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo, WeightTransferUpdateInfo


@dataclass
class HandedInit(WeightTransferInitInfo):
    """Empty: the worker needs no information."""


@dataclass
class HandedUpdate(WeightTransferUpdateInfo):
    """The file with the weights."""

    path: str


class WorkerSide(WeightTransferEngine[HandedInit, HandedUpdate]):
    """The worker's half: loads the file."""

    init_info_cls, update_info_cls = HandedInit, HandedUpdate

    def init_transfer_engine(self, init_info: HandedInit) -> None: ...

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # no accelerator to wait for

    def receive_weights(self, update_info: HandedUpdate) -> None:
        self.model.load_weights(load_file(update_info.path).items())

    def shutdown(self) -> None: ...


@dataclass
class Handing(TrainerInitInfo):
    """Settings of the trainer's half, and a record of what it did."""

    backend: ClassVar[str] = "handed"
    folder: Path
    calls: list[str] = field(default_factory=list)
    amiss: str = ""  # "lost": the weights never arrive; "refused": vLLM raises


class TrainerSide(TrainerWeightTransferEngine[Handing]):
    """The trainer's half: writes all tensors of its source to the file."""

    init_info_cls = Handing

    @classmethod
    def trainer_init(cls, init_info: Handing, *, client: Any, source: Any = None) -> Self:
        made = cls(client=client, source=source)
        made.how = init_info
        client.init_weight_transfer_engine({})
        return made

    how: Handing

    def send_weights(self) -> None:
        self.how.calls.append(self.how.amiss or "sent")
        if self.how.amiss == "lost":
            return
        path = self.how.folder / "weights.safetensors"
        if self.how.amiss != "refused":
            save_file({name: tensor.detach().contiguous() for name, tensor in self.source or ()}, path)
        self.client.start_weight_update()
        self.client.update_weights({"path": str(path)})
        self.client.finish_weight_update()
        path.unlink()


class Extension:
    """The class for `worker_extension_cls`, which makes vLLM's worker import this module."""


WeightTransferEngineFactory.register_engine("handed", WorkerSide)
WeightTransferTrainerFactory.register_engine("handed", TrainerSide)
