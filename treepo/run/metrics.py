"""Metrics of the trees that a step has sampled. Names are `group/name`, because trackers group by the first part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from treepo.tree import ScoredTree, Stop

Metrics = dict[str, Any]
"""One line of `metrics.jsonl`: names such as `reward/mean`, and numbers or None (not known)."""


def describe(step: int, sampled: Sequence[ScoredTree], used: Sequence[ScoredTree]) -> Metrics:
    """Metrics of the trees that were `sampled` in a step, and of those that are `used` for the update.

    Takes milliseconds for 300,000 tokens: except for one sum over the log-probs, it walks nodes and not tokens.
    """
    trees = [scored.tree for scored in sampled]
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves()]
    lengths = [tree.response_length(leaf) for tree, leaf in leaves]
    known = [reward for scored in sampled for reward in scored.rewards if reward is not None]
    generated, flat = sum(tree.unique_tokens for tree in trees), sum(lengths)
    nodes = [node for tree in trees for node in tree.nodes[1:]]
    mixed = sum(len({node.version for node in tree.nodes[1:]}) > 1 for tree in trees)
    with_logprob = sum(len(node.logprobs) for node in nodes)
    stops = Counter(tree.nodes[leaf].stop for tree, leaf in leaves)
    mean = sum(known) / len(known) if known else None
    return {
        "step": step,
        "reward/mean": mean,
        "reward/std": None if mean is None else math.sqrt(sum((r - mean) ** 2 for r in known) / len(known)),
        "reward/unknown": len(leaves) - len(known),
        "prompts/sampled": len(sampled),
        "prompts/used": len(used),
        "rollouts/count": len(leaves),
        "tokens/generated": generated,
        "tokens/flat": flat,
        "tokens/sharing": flat / max(1, generated),
        "response_tokens/mean": flat / max(1, len(leaves)),
        "response_tokens/max": max(lengths, default=0),
        # The mean of -log p over sampled tokens estimates the entropy. `entropy/mean`, from the update, is exact.
        "entropy/sampled": -sum(sum(node.logprobs) for node in nodes) / with_logprob if with_logprob else None,
        "staleness/mean": sum(step - 1 - node.version for node in nodes) / len(nodes) if nodes else None,
        "staleness/mixed": mixed / max(1, len(trees)),
        **{f"stop/{stop.value}": stops[stop] for stop in Stop if stops[stop]},
    }


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | str | bool]:
    """Nested values under dotted names, for trackers. Lists and None are left out."""
    flat: dict[str, float | int | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flat_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float | int | str | bool):
            flat[prefix + name] = value
    return flat
