"""What every estimator of advantages has in common, and the whitening that any of them may end with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from pydantic import Field

from treepo.forest import Floats, Forest
from treepo.settings import Settings


class Advantage(Protocol):
    """What the learner needs: a pure function of trees and rewards."""

    def __call__(self, forest: Forest) -> Floats:
        """[L, D + 1] the advantage that each leaf gives to the tokens of each node on its path (`Forest.path`).

        Column 0 belongs to the prompt and is not used. Entries beyond a path's end are not used either.
        """
        ...


class Estimator(Settings, ABC):
    """An estimator of ours: frozen settings whose call gives the advantages, whitened if `whiten` says so.

    A subclass writes `values`. Entries beyond a path's end must be zero there.
    """

    whiten: bool = Field(False, description="Whiten over all response tokens of the batch.")

    def __call__(self, forest: Forest) -> Floats:
        """[L, D + 1] advantages of `forest`."""
        values = self.values(forest)
        return whitened(forest, values) if self.whiten else values

    @abstractmethod
    def values(self, forest: Forest) -> Floats:
        """[L, D + 1] advantages before whitening."""


def whitened(forest: Forest, values: Floats) -> Floats:
    """(values - mean) / sqrt(var + 1e-8), where every token of every leaf counts once; values [L, D + 1].

    The variance is the unbiased one, as in the code released with arXiv 2508.17445.
    """
    on_path = forest.path >= 0
    tokens = np.where(on_path, forest.length[forest.path], 0)  # [L, D + 1]; roots add no response token
    total = tokens.sum()
    if total < 2:
        return np.zeros_like(values)
    mean = (tokens * values).sum() / total
    variance = (tokens * (values - mean) ** 2).sum() / (total - 1)
    return np.where(on_path, (values - mean) / np.sqrt(variance + 1e-8), 0.0)
