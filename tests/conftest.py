"""Settings of hypothesis, random trees as fixtures, and a model on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.support.random_trees import grow_random, rollout_of
from treepo.tree import ScoredTree, Tree

# A loaded machine must fail no test; in CI the same commit draws the same examples.
settings.register_profile(
    "treepo",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("treepo")


@pytest.fixture
def random_tree() -> Callable[..., Tree]:
    return grow_random


@pytest.fixture
def random_rollout() -> Callable[..., ScoredTree]:
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
