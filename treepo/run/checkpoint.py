"""Checkpoints: the whole state of a run in a folder, which is complete or does not exist.

`checkpoints/step-000040/` is a Hugging Face folder of a model, or of an adapter (which names its base model). It has
two more files: `optimizer.safetensors` and `state.json`. There is no random state, because every random number is keyed
by its place. No pickle is written or read. Importing this module does not load torch.
"""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from treepo.errors import ConfigError
from treepo.files import whole_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treepo.learner.update import Reference


@dataclass(frozen=True, slots=True)
class State:
    """The progress of a run. The weights and the optimizer are saved separately."""

    step: int = 0  # finished training steps
    position: int = 0  # training problems used so far
    generated_tokens: int = 0
    seconds: float = 0.0  # time in training steps


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: State,
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNN` and delete all but the `keep` newest. Raises `ConfigError` if writing fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from treepo.engines.weight_files import share
    from treepo.models import lora

    final = folder / f"step-{state.step:06d}"
    try:
        with whole_folder(final, sync=True) as part:
            lora.save(model, part)
            tokenizer.save_pretrained(part)
            save_file(_flat(model, optimizer), part / "optimizer.safetensors")
            (part / "state.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
            share(part)
    except (OSError, SafetensorError) as error:  # safetensors raises SafetensorError for a full disk
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{final}: cannot write the checkpoint: {reason}; the checkpoint before it is intact: "
            "free some disk space and continue with --resume"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = _all(folder)
    return found[-1] if found else None


def load_state(checkpoint: Path) -> State:
    """The progress of the run at `checkpoint`."""
    return State(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def load_optimizer(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's moments, bit for bit."""
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    for place, value in load_file(checkpoint / "optimizer.safetensors").items():
        key, _, name = place.partition("|")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device if value.dim() else "cpu")


def initial_policy(model: PreTrainedModel, kept: Path, source: str | None, *, resumed: bool, keeps: bool) -> Reference:
    """The initial policy of a run, for a loss with a KL term. For a new adapter, it is the model without the adapter.

    `source`: folder or Hub name of the initial policy. Without it, the folder `kept` has the initial policy: a new run
    saves it there if `keeps` is true (in one process). `resumed`: the run was resumed, so `model` has been trained.
    """
    from treepo.models import causal_lm, lora

    continued = source is not None and lora.base_of(source) is not None
    if lora.adapted(model) and not continued:
        return partial(lora.without, model)
    if resumed or continued:
        frozen = causal_lm.load(source or str(kept), str(model.dtype).removeprefix("torch."), model.device)
    else:
        frozen = copy.deepcopy(model)
        if source is None and keeps:
            frozen.save_pretrained(kept)
    frozen.requires_grad_(False)
    return lambda: nullcontext(frozen)


def _flat(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}|{name}": value.detach().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
