"""Estimators that compare a leaf with all leaves of its query, whatever the tree: the baselines.

Every token of a leaf gets the leaf's value. A query with a single leaf has nothing to compare with and gets 0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from treepo.forest import Floats, Forest
from treepo.settings import Settings


class GRPO(Settings):
    """(reward - mean) / (std + 1e-6) over the query's leaves, with the unbiased std. Source: arXiv 2402.03300."""

    kind: Literal["grpo"] = "grpo"
    whiten: bool = Field(False, description="Whiten over all response tokens of the batch.")

    def __call__(self, forest: Forest) -> Floats:
        count, mean = _groups(forest)
        deviation = forest.rewards - mean
        total = np.bincount(forest.tree, deviation**2, len(forest.first_node) - 1)[forest.tree]
        std = np.sqrt(total / np.maximum(count - 1, 1))
        return _on_path(forest, deviation / (std + 1e-6))


class DrGRPO(Settings):
    """reward - mean over the query's leaves: GRPO without its bias towards easy and hard queries. arXiv 2503.20783."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    whiten: bool = Field(False, description="Whiten over all response tokens of the batch.")

    def __call__(self, forest: Forest) -> Floats:
        return _on_path(forest, forest.rewards - _groups(forest)[1])


class RLOO(Settings):
    """reward - mean of the query's *other* leaves, which keeps the gradient unbiased. Source: arXiv 2402.14740."""

    kind: Literal["rloo"] = "rloo"
    whiten: bool = Field(False, description="Whiten over all response tokens of the batch.")

    def __call__(self, forest: Forest) -> Floats:
        count, mean = _groups(forest)
        return _on_path(forest, (forest.rewards - mean) * count / np.maximum(count - 1, 1))


class ReinforcePP(Settings):
    """reward - mean over the query's leaves, whitened over the batch: REINFORCE++ with baseline. arXiv 2501.03262."""

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    whiten: bool = Field(True, description="Whiten over all response tokens of the batch.")

    def __call__(self, forest: Forest) -> Floats:
        return _on_path(forest, forest.rewards - _groups(forest)[1])


def _groups(forest: Forest) -> tuple[Floats, Floats]:
    """Number of leaves and mean reward of each leaf's query, both [L]."""
    trees = len(forest.first_node) - 1
    count = np.bincount(forest.tree, minlength=trees).astype(float)
    mean = np.bincount(forest.tree, forest.rewards, trees) / np.maximum(count, 1)
    return count[forest.tree], mean[forest.tree]


def _on_path(forest: Forest, value: Floats) -> Floats:
    return np.where(forest.path >= 0, value[:, None], 0.0)
