"""Small models for tests of the embedded engine, and the oracle: a plain forward pass of the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.models import causal_lm
from treepo.tree import Tree

V = 40
FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4]]


def plain_model(family: str = "qwen2", kv_heads: int = 2, *, seed: int = 0, context: int = 128) -> Any:
    """An unprepared model of random weights, large enough that what it says depends on every token before."""
    config, cls = FAMILIES[family]
    torch.manual_seed(seed)
    model = cls(
        config(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=8,
            intermediate_size=48,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model


def prepared(**options: Any) -> Any:
    return causal_lm.prepare(plain_model(**options))


def paged(size: int) -> type[LocalEngine]:
    """An engine of pages so small that the trees of these tests have many."""

    class Paged(LocalEngine):
        page = size

    return Paged


def with_room(tokens: int, slots: int, context: int = 64) -> LocalSettings:
    """Settings that leave room for `tokens` beside the slots of the model of these tests."""
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size of a head, float32
    return LocalSettings(slots=slots, max_tokens=context, memory_gib=(tokens + slots * context) * token_bytes / 2**30)


def oracle(plain: Any, tokens: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs [T - 1] of tokens[1:] from one full forward of a model that never met treepo."""
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def worst_error(plain: Any, tree: Tree, temperature: float = 1.0) -> float:
    """Largest difference between a node's log-probs and the oracle's, over every node of the tree."""
    worst = 0.0
    for index, node in enumerate(tree.nodes[1:], 1):
        expected = oracle(plain, tree.tokens(index), temperature)[-len(node.tokens) :]
        worst = max(worst, (expected - torch.tensor(node.logprobs)).abs().max().item())
    return worst
