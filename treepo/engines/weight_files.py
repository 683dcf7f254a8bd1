"""A model's weights in a folder, for engines that read them there."""

from __future__ import annotations

import stat
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from treepo.files import whole_folder, writing
from treepo.models import lora


def save(model: PreTrainedModel, folder: Path, version: int, *, untied: bool = False) -> Path:
    """`model`, or its adapter alone if it has one, as `folder/version-...`; returns that path.

    `untied`: with an output matrix of its own, even if it shares the input's; what the model computes is the same.
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
    """Let those read the safetensors in `folder` who may read the JSON beside them: servers may be somebody else's.

    The library makes them its user's alone.
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
