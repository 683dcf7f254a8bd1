"""A small adapter for tests: its settings, an update of it, and what a model with it computes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from treepo.engines.weight_check import probe_tree
from treepo.models import causal_lm
from treepo.models.lora import LoraSettings

SMALL = LoraSettings(rank=4, alpha=8)


def stir(model: PreTrainedModel, by: float = 0.1, seed: int = 1) -> None:
    """Move all weights of the adapter; one half of them is zeros at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits of every token of the probe's prompt: [1, T, V] float."""
    ids = torch.tensor([probe_tree(model).prompt])
    with torch.no_grad():
        states = causal_lm.hidden(model, ids, torch.arange(ids.shape[1])[None], causal_lm.Causal())
        return causal_lm.logits(model, states)
