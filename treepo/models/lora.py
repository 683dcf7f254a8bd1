"""LoRA (arXiv 2106.09685): a few new weights beside a frozen model. Only these are trained, saved and sent to engines.

The layers are those of peft, put into the model itself. The model stays a model of transformers, so attention, updates
and the local engine need no code for adapters. An adapter's folder is in peft's format, which vLLM, SGLang and
transformers read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as as_bytes
from torch import Tensor
from transformers import PreTrainedModel

from treepo.errors import ConfigError
from treepo.models.settings import LoraSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
BASE = "base"  # in a run's folder: the new model that its adapters belong to


def attach(model: PreTrainedModel, settings: LoraSettings, base: str, seed: int) -> None:
    """Give `model` (in place) a new adapter, and freeze its other weights. Its outputs do not change yet.

    The adapter's weights are a function of `seed`. `base`: the folder or Hub name of the model as it is now. It is
    written into the adapter's folder, so that an engine can find the base.

    Raises `ConfigError` if peft is not installed or the model has none of the layers `settings.targets`.
    """
    targets: Any = settings.targets
    _add(
        model,
        _peft().LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=targets,
            lora_dropout=0.0,  # in a packed pass all paths would share one dropout mask
            task_type="CAUSAL_LM",
        ),
        base,
        seed,
    )


def restore(model: PreTrainedModel, folder: Path, settings: LoraSettings | None = None) -> None:
    """Give `model` (in place) the adapter in `folder`, and freeze its other weights.

    Raises `ConfigError`, and leaves the model as it was, if the folder holds no adapter, one for another model, or one
    with other settings than `settings`.
    """
    peft = _peft()
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}: it is no adapter")
    try:
        config, state = peft.PeftConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"the adapter in {folder} cannot be read: {error}") from error
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"the adapter in {folder} is of another kind than LoRA: {config.peft_type}")
    if settings is not None:
        for name, had, wanted in (("rank", config.r, settings.rank), ("alpha", config.lora_alpha, settings.alpha)):
            if had != wanted:
                raise ConfigError(
                    f"model.lora.{name}: the adapter in {folder} has {had}, not {wanted}: set the same, or "
                    "model.lora=null, which merges it into the model"
                )
        if config.lora_dropout:
            raise ConfigError(f"model.path: the adapter in {folder} has dropout, with which it cannot be trained here")
    config.inference_mode = False
    _add(model, config, str(config.base_model_name_or_path), 0)
    try:
        _overwrite(model, folder, state)
    except ConfigError:
        detach(model)
        raise


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Overwrite the adapter of `model` with the one in `folder`. Raises `ConfigError` if it has other shapes."""
    _overwrite(model, folder, load_file(folder / WEIGHTS))


def _overwrite(model: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    own = _state(model)
    if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in state.items()}:
        raise ConfigError(f"the adapter in {folder} is for another model")
    for name, value in own.items():
        value.copy_(state[name])


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write `model`, or its adapter alone if it has one, into `folder`."""
    if not adapted(model):
        model.save_pretrained(folder)
        return
    # Not `model.save_pretrained`: transformers would ask the Hub about the base every time.
    settings_of(model).save_pretrained(str(folder))
    save_file({name: value.contiguous() for name, value in _state(model).items()}, folder / WEIGHTS, {"format": "pt"})


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` (in place) with the adapter in `folder` added to its weights."""
    restore(model, folder)
    detach(model, merge=True)
    return model


def detach(model: PreTrainedModel, *, merge: bool = False) -> None:
    """Take the adapter out of `model` (in place). With `merge`, add it to the weights. Does nothing without one."""
    if not adapted(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [x for x in model.named_modules() if isinstance(x[1], BaseTunerLayer)]:
        if merge:
            layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False  # transformers would save an adapter otherwise
    model.requires_grad_(True)


def adapted(model: PreTrainedModel) -> bool:
    """Whether `model` has an adapter. If so, only the adapter is trained and sent to engines."""
    return hasattr(model, "peft_config")


@contextmanager
def without(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` with its adapter switched off, until the context ends."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def settings_of(model: PreTrainedModel) -> Any:
    """peft's configuration of the adapter: `r`, `lora_alpha`, `base_model_name_or_path` and more."""
    (config,) = model.peft_config.values()
    return config


def name_of(model: PreTrainedModel) -> str:
    """A name for the adapter as it is now, from a hash of its weights. So a server's cache never mixes two versions."""
    return f"treepo-{hashlib.sha256(as_bytes(_state(model))).hexdigest()[:16]}"


def base_of(path: str) -> str | None:
    """The model that the adapter in folder `path` belongs to; None: the folder holds no adapter.

    If the base is not where the adapter says, it is looked for in the run's folder: the whole run may have been moved.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        return None
    base = str(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path"))
    beside = folder.absolute().parent.parent / BASE
    return str(beside) if not Path(base).exists() and beside.is_dir() else base


def _add(model: PreTrainedModel, config: Any, base: str, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.add_adapter(config)
        except ValueError as error:
            model._hf_peft_config_loaded = False
            raise ConfigError(f"model.lora.targets: {error}") from error
    config.base_model_name_or_path = base
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # small updates would be lost
    model.eval()  # type: ignore[no-untyped-call]


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's weights under the names that peft gives them in files."""
    return {
        f"base_model.model.{name.replace('.default', '')}": parameter.detach()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def _peft() -> Any:
    if find_spec("peft") is None:
        raise ConfigError("model.lora: adapters need peft: pip install 'treepo[lora]'")
    import peft

    return peft
