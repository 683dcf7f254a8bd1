"""Whitening: advantages of zero mean and unit variance over all response tokens of the batch."""

from __future__ import annotations

import numpy as np

from treepo.forest import Floats, Forest


def whiten(forest: Forest, values: Floats) -> Floats:
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
