"""Advantages: pure functions of (tree shapes, rewards), for all trees of a batch at once.

An estimator is a frozen model whose call maps a `Forest` to an array [L, D + 1]: the advantage that the tokens of each
node on a leaf's path get from that leaf. Column 0 belongs to the prompt and is not used; entries beyond a leaf's depth
are zero. Whitening is a step of its own.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from treepo.advantages.group import GRPO, RLOO, DrGRPO, ReinforcePP, TreeGRPO
from treepo.advantages.segment import TreePOSegment
from treepo.advantages.spo import SPO
from treepo.advantages.treepo import TreePO
from treepo.advantages.treerl import AttnRL, TreeRL
from treepo.advantages.whitening import whiten
from treepo.forest import Floats, Forest

Estimator = Annotated[
    TreePO | TreePOSegment | SPO | TreeRL | AttnRL | TreeGRPO | GRPO | DrGRPO | RLOO | ReinforcePP,
    Field(discriminator="kind"),
]

__all__ = [
    "GRPO",
    "RLOO",
    "SPO",
    "AttnRL",
    "DrGRPO",
    "Estimator",
    "ReinforcePP",
    "TreeGRPO",
    "TreePO",
    "TreePOSegment",
    "TreeRL",
    "advantages",
    "whiten",
]


def advantages(estimator: Estimator, forest: Forest) -> Floats:
    """[L, D + 1] advantages of `forest`, whitened over the batch if the estimator asks for it."""
    values = estimator(forest)
    return whiten(forest, values) if estimator.whiten else values
