"""A transfer of weights that works on CPUs, through vLLM's interface for transfers of others: a file at a time.

With it, `treepo.engines.vllm.transfer` can be run where CUDA's own transfer cannot. Two processes import this.
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
class Init(WeightTransferInitInfo):
    """The worker need not know anything."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Where some of the weights are."""

    path: str


class WorkerSide(WeightTransferEngine[Init, Update]):
    """Loads what it is handed."""

    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info: Init) -> None: ...

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # no accelerator to wait for

    def receive_weights(self, update_info: Update) -> None:
        self.model.load_weights(load_file(update_info.path).items())

    def shutdown(self) -> None: ...


@dataclass
class Handing(TrainerInitInfo):
    """How the trainer hands weights over."""

    backend: ClassVar[str] = "handed"
    folder: Path
    calls: list[str] = field(default_factory=list)
    amiss: str = ""  # "lost": they never arrive; "refused": vLLM raises


class TrainerSide(TrainerWeightTransferEngine[Handing]):
    """Hands over all that its source yields."""

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
    """What `worker_extension_cls` names, so that vLLM's worker imports this module."""


WeightTransferEngineFactory.register_engine("handed", WorkerSide)
WeightTransferTrainerFactory.register_engine("handed", TrainerSide)
