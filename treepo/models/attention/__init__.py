"""Attention over trees, in unmodified Hugging Face models.

After `install`, a model leaves every attention to the *plan* of its current forward pass: it calls `plan.attend(...)`.
The packed update has plans, and the local engine has one. Both run on the model's own weights and layers.

A packed row (`learner.packing`) has one rule for who sees whom, `visible`, and several plans that compute it. `Dense`
evaluates the rule for all pairs of tokens. The other plans give the same result and skip most of the pairs in which
the query does not see the key.
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
from treepo.models.attention.plan import Causal, Dense, Ints, Plan, chain_starts, visible
from treepo.models.attention.tiling import tiling_of
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
    "chain_starts",
    "install",
    "plan_for",
    "visible",
]

NAME = "treepo"

HERE: dict[str, tuple[str, ...]] = {
    "cpu": ("auto", "blocks", "chains", "reference"),
    "cuda": ("auto", "flex", "varlen", "chains", "reference"),
}
"""The plans of a kind of device: `auto`, then the fastest, then the others. Other kinds of devices have `ELSEWHERE`."""
ELSEWHERE = ("auto", "chains", "reference")

log = logging.getLogger(__name__)


def plan_for(prev: Ints, end: Ints, past: int = 0, name: PlanName = "auto", device: torch.device | str = "cpu") -> Plan:
    """The plan called `name` for a packed row. Every name gives the same attention up to rounding.

    `prev` and `end` [T] are those of the `PackedBatch`. `past`: the number of keys that come before the row's own and
    that every row sees. The plan attends with q [1, H, T, d] to k and v [1, K, past + T, d].

    - `reference`: the rule itself, for all T x (past + T) pairs (`Dense`).
    - `chains`: a few padded calls of public PyTorch, on any device (`Chains`).
    - `blocks`: views merged by log-sum-exps, on CPUs (`Blocks`). It keeps the least for the backward pass.
    - `flex`: one fused kernel compiled for the rule, on CUDA (`Flex`).
    - `varlen`: flash attention of each chain to its path, on CUDA in half precision (`Varlen`).
    - `auto`: on a CPU `blocks` or `chains`, whichever costs less by the number of pairs, rows and calls. Short
      segments would need many calls of `blocks`; then it is `chains`. On CUDA `flex`: it copies no keys, pads nothing,
      shares key heads, and runs in any precision but float64. Elsewhere `chains`.

    Raises `ConfigError` for a name that does not exist or does not work on this device, and `ValueError` for an empty
    row.
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
        tiling = tiling_of(prev, end)
        if name == "blocks" or tiling.cost + past * len(prev) <= chains_cost(prev, end, past):
            return Blocks(tiling, end, past)
    return Chains(prev, end, past, device)


@cache
def _unfit(name: str) -> str:
    """Why the plan `name` does not work with what is installed; empty if it works. Logged once."""
    reason = ""
    if name == "blocks":
        reason = refused()
    elif name == "flex" and find_spec("triton") is None:
        reason = "FlexAttention is compiled with triton, which is not installed"
    if reason:
        log.warning("attention: the portable plan 'chains' runs in place of %r: %s", name, reason)
    return reason


def install(model: PreTrainedModel) -> None:
    """Let every layer of `model` attend through the plan of the forward pass (in place)."""
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    plan: Plan | None = options.get("plan")
    if plan is None:
        raise ValueError("this model runs under a treepo plan: call it through causal_lm, or set another attention")
    # A plan does not have these. To ignore them would give wrong results without a word.
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name!r} is not supported")
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    return plan.attend(module.layer_idx, q, k, v, scale), None  # type: ignore[arg-type]
