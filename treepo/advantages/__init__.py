"""Advantages: pure functions of tree shapes and rewards, for all trees of a batch at once.

An estimator is a frozen model whose call maps a `Forest` to an array [L, D + 1]. Entry (l, d) is the advantage that
leaf l gives to the tokens of the node at position d of its path. Each family of estimators has its file.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Discriminator, Tag

from treepo.advantages.baselines import GRPO, RLOO, DrGRPO, ReinforcePP, TreeGRPO
from treepo.advantages.estimator import Advantage, Estimator, whitened
from treepo.advantages.segment import TreePOSegment
from treepo.advantages.spo import SPO
from treepo.advantages.treepo import TreePO
from treepo.advantages.treerl import AttnRL, TreeRL
from treepo.forest import Floats, Forest
from treepo.user_code import Custom, kind_of, one_of

__all__ = [
    "GRPO",
    "RLOO",
    "SPO",
    "Advantage",
    "AnyEstimator",
    "AttnRL",
    "CustomEstimator",
    "DrGRPO",
    "Estimator",
    "ReinforcePP",
    "TreeGRPO",
    "TreePO",
    "TreePOSegment",
    "TreeRL",
    "whitened",
]


class CustomEstimator(Custom):
    """Your class. It needs `__call__(forest)` as in `Advantage`."""

    calls: ClassVar[dict[str, Any]] = {"__call__": Advantage.__call__}

    def __call__(self, forest: Forest) -> Floats:
        values: Any = self.made(forest)
        if not isinstance(values, np.ndarray) or values.shape != forest.path.shape:
            found = f"of shape {values.shape}" if isinstance(values, np.ndarray) else repr(values)[:80]
            raise self._refuse(
                f"returned {found}: it must return an array of shape {forest.path.shape} (the shape of forest.path)"
            )
        if not np.isfinite(values[:, 1:]).all():
            raise self._refuse("returned values that are not finite")
        return values.astype(np.float64)


AnyEstimator = Annotated[
    Annotated[TreePO, Tag("treepo")]
    | Annotated[TreePOSegment, Tag("segment")]
    | Annotated[SPO, Tag("spo")]
    | Annotated[TreeRL, Tag("treerl")]
    | Annotated[AttnRL, Tag("attnrl")]
    | Annotated[TreeGRPO, Tag("tree_grpo")]
    | Annotated[GRPO, Tag("grpo")]
    | Annotated[DrGRPO, Tag("dr_grpo")]
    | Annotated[RLOO, Tag("rloo")]
    | Annotated[ReinforcePP, Tag("reinforce_pp")]
    | Annotated[CustomEstimator, Tag("custom")],
    Discriminator(kind_of()),
    one_of(
        *("treepo", "segment", "spo", "treerl", "attnrl", "tree_grpo", "grpo", "dr_grpo", "rloo", "reinforce_pp"),
    ),
]
