"""The parent of all estimators of advantages, and whitening."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from pydantic import Field

from treepo.forest import Floats, Forest
from treepo.settings import Settings


class Advantage(Protocol):
    """What the learner needs of an estimator: a pure function of trees and rewards."""

    def __call__(self, forest: Forest) -> Floats:
        """[L, D + 1] the advantage that each leaf gives to the tokens of each node on its path (`Forest.path`).

        Column 0 (the prompt) and entries after the end of a path are not used.
        """
        ...


class Estimator(Settings, ABC):
    """The parent of treepo's estimators. A call gives the advantages, whitened if `whiten` is set.

    A subclass defines `values`. Its entries after the end of a path must be 0.
    """

    whiten: bool = Field(False, description="Normalise to mean 0 and variance 1 over all response tokens of the batch.")

    def __call__(self, forest: Forest) -> Floats:
        """[L, D + 1] advantages of `forest`."""
        values = self.values(forest)
        return whitened(forest, values) if self.whiten else values

    @abstractmethod
    def values(self, forest: Forest) -> Floats:
        """[L, D + 1] advantages before whitening."""


def whitened(forest: Forest, values: Floats) -> Floats:
    """[L, D + 1] (values - mean) / sqrt(var + 1e-8). Mean and variance are over all tokens of all leaves.

    A token that k leaves share counts k times. The variance is the unbiased one, as in the code released with arXiv
    2508.17445. `values` is [L, D + 1].
    """
    on_path = forest.path >= 0
    tokens = np.where(on_path, forest.length[forest.path], 0)  # [L, D + 1]; roots have no response token
    total = tokens.sum()
    if total < 2:
        return np.zeros_like(values)
    mean = (tokens * values).sum() / total
    variance = (tokens * (values - mean) ** 2).sum() / (total - 1)
    return np.where(on_path, (values - mean) / np.sqrt(variance + 1e-8), 0.0)
