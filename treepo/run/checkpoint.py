"""Checkpoints: the whole state of a run in a folder that appears at once or not at all.

`checkpoints/step-000040/` is a Hugging Face model folder, or that of an adapter (which names its base), with two more
files: `optimizer.safetensors` and `state.json`.
There is no random state to keep: every draw is keyed by its place. No pickle is written or read.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treepo.engines.weight_files import share
from treepo.errors import ConfigError
from treepo.files import whole_folder
from treepo.models import lora


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands, apart from weights and optimizer."""

    step: int = 0  # finished steps
    position: int = 0  # training problems consumed
    generated_tokens: int = 0
    seconds: float = 0.0


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: State,
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNN` and drop all but the `keep` newest; raises `ConfigError` when the disk refuses."""
    final = folder / f"step-{state.step:06d}"
    try:
        with whole_folder(final, sync=True) as part:
            lora.save(model, part)
            tokenizer.save_pretrained(part)
            save_file(_flat(model, optimizer), part / "optimizer.safetensors")
            (part / "state.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
            share(part)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says that a disk is full
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{final}: cannot write the checkpoint: {reason}; the last complete one stands: "
            "make room and continue with --resume"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = _all(folder)
    return found[-1] if found else None


def load_state(checkpoint: Path) -> State:
    """Where the run stood."""
    return State(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def load_optimizer(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's moments, bit for bit."""
    parameters = dict(model.named_parameters())
    for place, value in load_file(checkpoint / "optimizer.safetensors").items():
        key, _, name = place.partition("|")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device if value.dim() else "cpu")


def _flat(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}|{name}": value.detach().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
