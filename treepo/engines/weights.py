"""A model's weights in a folder, for engines that read them there."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from treepo.errors import writing


def save(model: PreTrainedModel, folder: Path, version: int, *, untied: bool = False) -> Path:
    """`model` as `folder/version-...`, which appears at once or not at all; returns that path.

    `untied`: with an output matrix of its own, even if it shares the input's; what the model computes is the same.
    """
    final = folder / f"version-{version:06d}"
    part = final.with_name(f".{final.name}.part")
    with writing(final, "engine.weights_dir must be a folder that this process can write to"):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if untied and model.config.tie_word_embeddings:
            _save_untied(model, part)
        else:
            model.save_pretrained(part)
        with suppress(FileNotFoundError):
            shutil.rmtree(final)
        part.rename(final)
    return final


def _save_untied(model: PreTrainedModel, folder: Path) -> None:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    (name,) = [name for name, module in model.named_modules() if module is head]
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state | {f"{name}.weight": head.weight.detach().clone()}, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"tie_word_embeddings": False, "architectures": [type(model).__name__]}
    type(model.config).from_dict(config).save_pretrained(folder)
