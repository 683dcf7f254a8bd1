"""Trees grown at random, for properties that hold for any tree."""

from __future__ import annotations

from random import Random

from treepo.tree import ScoredTree, Stop, Tree


def grow_random(seed: int, *, leaves: int = 8, segment: int = 6, vocabulary: int = 20, splits: int = 2) -> Tree:
    """A random finished tree: forks of 1 to 3 children, segments of 1 to `segment` tokens, a few split nodes."""
    rng = Random(seed)
    tree = Tree([rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))], key=f"q{seed}", seed=seed)
    frontier = [0]
    while frontier:
        node = frontier.pop(rng.randrange(len(frontier)))
        for _ in range(rng.randint(1, 3)):
            tokens = [rng.randrange(vocabulary) for _ in range(rng.randint(1, segment))]
            logprobs = [-rng.random() * 3 for _ in tokens]
            entropies = [-2 * lp for lp in logprobs] if seed % 2 else None
            child = tree.add(node, tokens, logprobs, seed=rng.getrandbits(60), version=1, entropies=entropies)
            if len(tree.leaves()) + len(frontier) + 1 >= leaves or rng.random() < 0.3:
                tree.finish(child, rng.choice([Stop.ANSWER, Stop.EOS, Stop.LENGTH]))
            else:
                frontier.append(child)
    for _ in range(splits):
        node = rng.randrange(1, len(tree))
        if len(tree.nodes[node].tokens) > 1:
            tree.split(node, rng.randint(1, len(tree.nodes[node].tokens) - 1))
    return tree


def rollout_of(tree: Tree, seed: int = 0, unscored: float = 0.0) -> ScoredTree:
    """`tree` with random 0 / 1 rewards, some of them unknown."""
    rng = Random(seed)
    rewards = [None if rng.random() < unscored else float(rng.random() < 0.5) for _ in tree.leaves()]
    return ScoredTree(f"p{seed}", tree, rewards)
