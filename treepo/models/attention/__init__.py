"""Attention over trees: the seam through which unmodified Hugging Face models meet a plan.

A model prepared by `install` asks the *plan* of its current forward pass for every attention: `plan.attend(...)`.
The packed update and the embedded engine are plans; both run on the model's own weights and layers.

A packed row (`learner.packing`) has one rule, `visible`, and several plans. `Dense` is the rule written out for all
pairs. The others compute the same without most of the pairs that see nothing of each other.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from treepo.errors import ConfigError, nearest
from treepo.models.attention.blocks import Blocks, refused
from treepo.models.attention.chains import Chains
from treepo.models.attention.chains import cost as chains_cost
from treepo.models.attention.flex import Flex
from treepo.models.attention.plan import Causal, Dense, Ints, Plan, visible
from treepo.models.attention.tiling import cuts_of
from treepo.models.attention.varlen import Varlen, kernel
from treepo.models.settings import PlanName

__all__ = [
    "ELSEWHERE",
    "HERE",
    "NAME",
    "Blocks",
    "Causal",
    "Chains",
    "Dense",
    "Flex",
    "Plan",
    "PlanName",
    "Varlen",
    "install",
    "plan_for",
    "visible",
]

NAME = "treepo"

HERE: dict[str, tuple[str, ...]] = {
    "cpu": ("auto", "blocks", "chains", "reference"),
    "cuda": ("auto", "flex", "varlen", "chains", "reference"),
}
"""The plans of a kind of device, the fastest after `auto`; other kinds have `ELSEWHERE`."""
ELSEWHERE = ("auto", "chains", "reference")

log = logging.getLogger(__name__)


def plan_for(prev: Ints, end: Ints, past: int = 0, name: PlanName = "auto", device: torch.device | str = "cpu") -> Plan:
    """The plan called `name` for a packed row; every name gives the same attention up to rounding.

    `prev` and `end` [T] are those of the `PackedBatch`. Before the row's own keys come those of `past` tokens that
    every row sees: the plan attends with q [1, H, T, d] to k and v [1, K, past + T, d].

    - `reference`: the rule itself, for all T x T pairs (`Dense`).
    - `chains`: a few padded calls of public PyTorch, on any device (`Chains`).
    - `blocks`: views merged by log-sum-exps, on CPUs (`Blocks`). It keeps the least for the backward pass.
    - `flex`: one fused kernel compiled for the rule, on CUDA (`Flex`).
    - `varlen`: flash attention of each chain to its path, on CUDA in half precision (`Varlen`).
    - `auto`: on a CPU `blocks`, or `chains` where segments are short and calls would be many: what costs less by the
      number of pairs, rows and calls. On CUDA `flex`: it copies no keys, pads nothing, shares key heads, and runs in
      any precision but float64. Elsewhere `chains`.

    Raises `ConfigError` for a name that does not exist or does not work on this device.
    """
    device = torch.device(device)
    here = HERE.get(device.type, ELSEWHERE)
    if name not in here:
        raise ConfigError(
            f"attention plan {name!r} is not one of {', '.join(here)} (those of {device.type}){nearest(name, here)}"
        )
    if not len(prev):
        raise ValueError("a packed row needs at least one token")
    fastest = here[1]
    reason = _unfit(fastest) if name in ("auto", fastest) else ""
    if name == fastest and reason:
        raise ConfigError(f"attention plan {name!r} does not work here ({reason}): take 'auto' or 'chains'")
    wanted = name if name != "auto" else "chains" if reason else fastest
    if wanted == "reference":
        return Dense(end, past, device)
    if wanted == "varlen":
        return Varlen(prev, past, device, kernel())
    if wanted == "flex":
        return Flex(end, past, device)
    if wanted == "blocks":
        cuts = cuts_of(prev, end)
        if name == "blocks" or cuts.cost + past * len(prev) <= chains_cost(prev, end, past):
            return Blocks(cuts, end, past)
    return Chains(prev, end, past, device)


@cache
def _unfit(name: str) -> str:
    """Why a plan does not work with what is installed, empty if it does; said once, as `auto` goes on without it."""
    reason = ""
    if name == "blocks":
        reason = refused()
    elif name == "flex" and find_spec("triton") is None:
        reason = "FlexAttention is compiled with triton, which is not installed"
    if reason:
        log.warning("attention: the portable plan 'chains' runs in place of %r: %s", name, reason)
    return reason


def install(model: PreTrainedModel) -> None:
    """Route the attention of every layer of `model` through the plan of the forward pass (in place)."""
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    plan: Plan | None = options.get("plan")
    if plan is None:
        raise ValueError("this model runs under a treepo plan: call it through causal_lm, or set another attention")
    # What a plan cannot express must never be dropped silently.
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name!r} is not supported")
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    return plan.attend(module.layer_idx, q, k, v, scale), None  # type: ignore[arg-type]
