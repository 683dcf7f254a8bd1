"""The usual alternative to a packed update: one padded row per leaf through the model's own attention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from treepo.forest import Forest
from treepo.learner.loss import PolicyLoss, policy_loss
from treepo.models.causal_lm import prepare, token_logprobs

VOCABULARY = 512


def new_model(hidden: int, layers: int) -> PreTrainedModel:
    """A Qwen2-shaped model of random weights, prepared; heads of 64, two to a key head, like those of small models."""
    torch.manual_seed(0)
    heads = hidden // 64
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=3 * hidden,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.08,  # large enough for attention to differ between tokens
    )
    return prepare(AutoModelForCausalLM.from_config(config))


class FlatRows:
    """One row per leaf, longest first: its whole path, as other libraries train on it."""

    def __init__(self, forest: Forest, advantage: np.ndarray) -> None:
        self.rows = []  # (token ids of the path, prompt length, advantages of the response)
        for row, (t, node) in enumerate(zip(forest.tree, forest.leaf, strict=True)):
            tree = forest.trees[t].tree
            leaf = int(node - forest.first_node[t])
            path = tree.path(leaf)
            of_token = np.repeat(advantage[row, 1 : len(path)], [len(tree.nodes[n].tokens) for n in path[1:]])
            self.rows.append((tree.tokens(leaf), len(tree.prompt), of_token.astype(np.float32)))
        self.rows.sort(key=lambda row: -len(row[0]))
        self.tokens = sum(len(ids) for ids, *_ in self.rows)
        self.total = float(sum(len(adv) for _, _, adv in self.rows))  # response tokens of all leaves

    def __len__(self) -> int:
        return len(self.rows)

    def step(self, model: PreTrainedModel, micro: int) -> list[tuple[list[int], Tensor]]:
        """One accumulated gradient; returns the tokens of each row and the log-probs of its response."""
        model.zero_grad()
        found = []
        for begin in range(0, len(self.rows), micro):
            rows = self.rows[begin : begin + micro]
            longest = len(rows[0][0])
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            for i, (tokens, *_) in enumerate(rows):
                ids[i, : len(tokens)] = torch.as_tensor(tokens)
            lengths = torch.tensor([len(tokens) for tokens, *_ in rows])
            mask = torch.arange(longest)[None] < lengths[:, None]
            # Rows of equal length need no mask, and sdpa is faster without one.
            states = model.base_model(
                input_ids=ids, attention_mask=None if bool(mask.all()) else mask.long(), use_cache=False
            ).last_hidden_state
            prompts = torch.tensor([prompt for _, prompt, *_ in rows])
            wanted = mask[:, 1:] & (torch.arange(1, longest)[None] >= prompts[:, None])
            logprob = token_logprobs(model, states[:, :-1][wanted], ids[:, 1:][wanted])[0]
            advantage = torch.as_tensor(np.concatenate([adv for _, _, adv in rows]))
            signs = (advantage.clamp(min=0), advantage.clamp(max=0), torch.ones_like(advantage))
            loss, _ = policy_loss(PolicyLoss(), logprob, None, *signs, self.total)
            loss.backward()
            parts = logprob.detach().split([len(adv) for _, _, adv in rows])
            found += [(tokens, part) for (tokens, *_), part in zip(rows, parts, strict=True)]
        return found
