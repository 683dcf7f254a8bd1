"""TreePO: reinforcement learning on language models with trees of rollouts."""

__version__ = "0.1.0"
