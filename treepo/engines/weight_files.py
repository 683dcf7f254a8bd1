"""The weights of a model in folders, for engines that read them there."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from treepo.files import whole_folder, writing
from treepo.models import lora


class WeightSource:
    """The weights that an engine should decode with: those of `model`, under a version number.

    `write` puts them into `folder`. `writes`: whether this process writes them; of several processes that train one
    model, one does, and the others leave `path` at None.
    """

    def __init__(self, model: PreTrainedModel, folder: str | Path, *, writes: bool = True) -> None:
        self.model, self.writes = model, writes
        self.folder = Path(folder).expanduser().absolute()
        self.version = 0
        self.path: Path | None = None  # of the last weights that were written; None: none were
        self.adapter: str | None = None  # the name of the last adapter; None: whole weights, or nothing was written

    def write(self, *, untied: bool = False) -> None:
        """Write the weights as they are now, under the present version; see `save`."""
        self.adapter = lora.name_of(self.model) if lora.adapted(self.model) else None
        self.path = save(self.model, self.folder, self.version, untied=untied) if self.writes else None

    def drop(self, old: Path | None) -> None:
        """Delete the folder of weights that nothing reads any more, unless it is the present one."""
        if old is not None and old != self.path:
            shutil.rmtree(old, ignore_errors=True)


def save(model: PreTrainedModel, folder: Path, version: int, *, untied: bool = False) -> Path:
    """Write `model`, or its adapter alone if it has one, as `folder/version-NNNNNN`; returns that path.

    `untied`: write an output matrix even if the model shares it with the input; the model computes the same. Raises
    `ConfigError` if the folder cannot be written.
    """
    final = folder / f"version-{version:06d}"
    with (
        writing(final, "engine.weights_dir must be a folder that this process can write to"),
        whole_folder(final) as part,
    ):
        if untied and model.config.tie_word_embeddings and not lora.adapted(model):
            _save_untied(model, part)
        else:
            lora.save(model, part)
        share(part)
    return final


def share(folder: Path) -> None:
    """Give the safetensors in `folder` the file mode of the JSON beside them.

    The library lets only the owner read safetensors. A server may run as another user.
    """
    mode = stat.S_IMODE(next(folder.glob("*.json")).stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _save_untied(model: PreTrainedModel, folder: Path) -> None:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    (name,) = [name for name, module in model.named_modules() if module is head]
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state | {f"{name}.weight": head.weight.detach().clone()}, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"tie_word_embeddings": False, "architectures": [type(model).__name__]}
    type(model.config).from_dict(config).save_pretrained(folder)
