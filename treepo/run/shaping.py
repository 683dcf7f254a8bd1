"""Changes to rewards before advantages are computed. The trees on the disk keep the task's own rewards."""

from __future__ import annotations

from dataclasses import replace

from treepo.tree import ScoredTree


def overlong(tree: ScoredTree, window: int, penalty: float, budget: int) -> ScoredTree:
    """`tree` with a penalty for long responses in its rewards (DAPO's soft punishment, arXiv 2503.14476, eq. 13).

    `budget`: the most tokens of a response. The reward falls linearly over the last `window` tokens of the budget, by
    `penalty` for a response that uses all of it. `window` 0: no penalty.
    """
    if not window:
        return tree
    excess = [max(0, tree.tree.response_length(leaf) - (budget - window)) for leaf in tree.tree.leaves()]
    rewards = [
        None if reward is None else reward - penalty * over / window
        for reward, over in zip(tree.rewards, excess, strict=True)
    ]
    return replace(tree, rewards=rewards)
