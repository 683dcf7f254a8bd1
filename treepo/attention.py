"""Attention over trees: the seam through which unmodified Hugging Face models meet a plan.

A model prepared by `install` asks the *plan* of its current forward pass for every attention: `plan.attend(...)`.
The packed update and the embedded engine are plans; both run on the model's own weights and layers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "treepo"


class Plan(Protocol):
    """How the queries of one forward pass see the keys."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, H, T, d], k and v [B, K, T, d] with H a multiple of K; returns [B, T, H, d]."""
        ...


class Causal:
    """Plain causal rows without padding: the plan that every other one is compared with."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def install(model: PreTrainedModel) -> None:
    """Route the attention of every layer of `model` through the plan of the forward pass (in place)."""
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    plan: Plan | None = options.get("plan")
    if plan is None:
        raise ValueError("this model runs under a treepo plan: call it through treepo.model, or set another attention")
    # What a plan cannot express must never be dropped silently.
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name!r} is not supported")
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    return plan.attend(module.layer_idx, q, k, v, scale), None  # type: ignore[arg-type]
