"""Trajectories per CPU-second: trees on the embedded engine against i.i.d. sampling there and in transformers.

Every shape ends with 16 leaves per prompt and the same response length (no stop ids), so that all yield the same
number of trajectory tokens. The trees differ from i.i.d. only in how many tokens they have to decode for them.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import report
from treepo import model as causal_lm
from treepo.engines import Sampling
from treepo.engines.local import LocalEngine, LocalSettings
from treepo.seeds import derive
from treepo.tree import ROOT, Stop, Tree

LEAVES = 16
VOCABULARY = 512
# Children of every node, level by level; the segments have equal lengths.
SHAPES = {
    "iid": [16],
    "tree, early forks": [2, 2, 2, 2, 1, 1, 1, 1],
    "tree, late forks": [1, 1, 1, 1, 2, 2, 2, 2],
}


def new_model(hidden: int, layers: int, kv_heads: int, context: int) -> Any:
    """A Qwen2-shaped model of random weights, not prepared."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


async def grow(engine: LocalEngine, prompt: Sequence[int], key: str, forks: Sequence[int], response: int) -> Tree:
    """A tree of `forks` children per node and level; no node waits for another one."""
    tree = Tree(prompt, key=key)
    handle = await engine.open(tree, Sampling(), [])
    length = response // len(forks)

    async def below(node: int, level: int, *place: int) -> None:
        if level == len(forks):
            return tree.finish(node, Stop.LENGTH)

        async def child(branch: int) -> None:
            seed = derive(key, *place, branch)
            reply = await handle.generate(node, length, seed)
            await below(tree.add(node, reply.tokens, reply.logprobs, seed=seed), level + 1, *place, branch)

        await asyncio.gather(*(child(branch) for branch in range(forks[level])))
        return None

    await below(ROOT, 0)
    handle.close()
    return tree


def main() -> None:
    args = report.arguments(__doc__ or "")
    hidden, layers, prompts, response, repeats = (128, 4, 4, 64, 3) if args.quick else (384, 6, 8, 64, 3)
    rng = torch.Generator().manual_seed(1)
    prompt_ids = torch.randint(1, VOCABULARY, (prompts, 32), generator=rng)
    plain = new_model(hidden, layers, hidden // 128, 32 + response)
    engine = LocalEngine(causal_lm.prepare(copy.deepcopy(plain)), LocalSettings(slots=prompts * LEAVES))

    def hf_generate() -> None:
        rows = plain.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=response,
            num_return_sequences=LEAVES,
            use_cache=True,
        )
        if rows.shape != (prompts * LEAVES, 32 + response):
            raise RuntimeError(f"generate answered with {tuple(rows.shape)}")

    def trees(forks: Sequence[int]) -> Callable[[], None]:
        async def forest() -> list[Tree]:
            jobs = (grow(engine, ids, str(i), forks, response) for i, ids in enumerate(prompt_ids.tolist()))
            return await asyncio.gather(*jobs)

        def run() -> None:
            grown = asyncio.run(forest())
            if sum(tree.flat_tokens for tree in grown) != prompts * LEAVES * response:
                raise RuntimeError("the trees do not have the trajectories that were asked for")

        return run

    functions = {"hf generate, iid": hf_generate, **{name: trees(forks) for name, forks in SHAPES.items()}}
    seconds = report.alternate(functions, repeats)
    trajectory_tokens = prompts * LEAVES * response
    decoded = {name: prompts * decoded_tokens(forks, response) for name, forks in SHAPES.items()}
    results = [
        {
            "shape": name,
            "trajectory_tokens_per_s": trajectory_tokens / seconds[name],
            "ratio_to_iid": seconds["iid"] / seconds[name],
            "ratio_to_hf_generate": seconds["hf generate, iid"] / seconds[name],
            "trajectory_tokens": trajectory_tokens,
            "decoded_tokens": decoded.get(name, trajectory_tokens),
            "parameters": plain.num_parameters(),
        }
        for name in functions
    ]
    report.finish("sampling", results, args, columns=list(results[0])[:6])


def decoded_tokens(forks: Sequence[int], response: int) -> int:
    """Tokens that one tree of these forks decodes."""
    width, total = 1, 0
    for children in forks:
        width *= children
        total += width * (response // len(forks))
    return total


if __name__ == "__main__":
    main()
