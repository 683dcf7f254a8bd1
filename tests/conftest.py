"""Trees to test with, drawn by hand or grown at random, and a model on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, Qwen2Config

from treepo.tree import Rollout, Stop, Tree

# A loaded machine must fail no test; in CI the same commit draws the same examples.
settings.register_profile(
    "treepo",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("treepo")


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


def rollout_of(tree: Tree, seed: int = 0, unscored: float = 0.0) -> Rollout:
    """`tree` with random 0 / 1 rewards, some of them unknown."""
    rng = Random(seed)
    rewards = [None if rng.random() < unscored else float(rng.random() < 0.5) for _ in tree.leaves()]
    return Rollout(f"p{seed}", tree, rewards)


@pytest.fixture
def random_tree() -> Callable[..., Tree]:
    return grow_random


@pytest.fixture
def random_rollout() -> Callable[..., Rollout]:
    return lambda seed, unscored=0.0, **shape: rollout_of(grow_random(seed, **shape), seed, unscored)


@pytest.fixture
def on_cuda() -> torch.nn.Module:
    """A small untouched model on the GPU, without TF32."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=256,
    )
    return AutoModelForCausalLM.from_config(config).cuda().eval()
