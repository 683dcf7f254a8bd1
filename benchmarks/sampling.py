"""Trajectories per second: trees on the local engine against i.i.d. sampling there and in transformers.

Every shape has 16 leaves per prompt and the same response length (no stop ids), so all give the same number of
trajectory tokens. Trees need to decode fewer tokens for them than i.i.d. sampling. `efficiency` is the speed-up over
i.i.d. sampling divided by this ratio of decoded tokens: 1 means that a decoded token costs the same. Everything decodes
at most 128 rows at once. `generate` of transformers is timed only if the whole job has at most that many rows. With one
thread the seconds are CPU time, with more threads wall clock. The benchmark takes long, so everything is timed once
unless `--repeats` says otherwise.

    python -m benchmarks.sampling [--quick] [--threads N] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import asyncio
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import report
from treepo.engines import Sampling
from treepo.engines.local.batch import LocalStats
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.models import causal_lm
from treepo.seeds import derive
from treepo.tree import ROOT, Stop, Tree

LEAVES = 16
ROWS = 128  # decoded at once
PROMPT = 32  # tokens
HF = "hf generate, iid"
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
    """A tree with `forks[level]` children per node. No node waits for another one."""
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


@dataclass(frozen=True)
class Case:
    """One comparison of all shapes."""

    hidden: int
    layers: int
    prompts: int
    response: int


QUICK = [Case(128, 4, 4, 64)]
ONE_THREAD = [Case(384, 5, 8, 512), Case(384, 5, 32, 512), Case(640, 8, 8, 512), Case(640, 8, 32, 256)]
MORE_THREADS = [Case(384, 5, 8, 512), Case(640, 8, 8, 512)]
COLUMNS = [
    *("shape", "parameters", "prompts", "threads", "trajectory_tokens_per_s", "ratio_to_iid", "efficiency"),
    *("ratio_to_hf_generate", "rows_per_step", "repeats"),
]


def main() -> None:
    args = report.arguments(__doc__ or "", repeats=1)
    results = []
    for case in QUICK if args.quick else ONE_THREAD if args.threads == 1 else MORE_THREADS:
        for row in measure(case, args.repeats):
            results.append(row)
            print(", ".join(f"{key} {row[key]}" for key in COLUMNS), file=sys.stderr, flush=True)
        report.keep("sampling", results, args)
    report.finish("sampling", results, args, columns=COLUMNS)


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """The results of `case`, one for each shape and for `generate`."""
    rng = torch.Generator().manual_seed(1)
    prompt_ids = torch.randint(1, VOCABULARY, (case.prompts, PROMPT), generator=rng)
    plain = new_model(case.hidden, case.layers, case.hidden // 128, PROMPT + case.response)
    engine = LocalEngine(causal_lm.prepare(copy.deepcopy(plain)), LocalSettings(slots=min(ROWS, case.prompts * LEAVES)))
    stats = {}

    def hf_generate(response: int) -> int:
        rows = plain.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=response,
            num_return_sequences=LEAVES,
            use_cache=True,
        )
        if rows.shape != (case.prompts * LEAVES, PROMPT + response):
            raise RuntimeError(f"generate answered with {tuple(rows.shape)}")
        return len(rows) * response

    def trees(name: str, response: int) -> int:
        async def forest() -> list[Tree]:
            jobs = (grow(engine, ids, str(i), SHAPES[name], response) for i, ids in enumerate(prompt_ids.tolist()))
            return await asyncio.gather(*jobs)

        engine.stats = LocalStats()
        tokens = sum(tree.flat_tokens for tree in asyncio.run(forest()))
        if tokens != case.prompts * LEAVES * response:
            raise RuntimeError("the trees do not have the trajectories that were asked for")
        stats[name] = engine.stats
        return tokens

    functions: dict[str, Callable[[int], int]] = {name: partial(trees, name) for name in SHAPES}
    if case.prompts * LEAVES <= ROWS:
        functions = {HF: hf_generate, **functions}
    speed = alternate(functions, case.response, repeats)
    decoded = {name: found.decoded_tokens for name, found in stats.items()}
    return [
        {
            "shape": name,
            "parameters": plain.num_parameters(),
            "prompts": case.prompts,
            "threads": torch.get_num_threads(),
            "trajectory_tokens_per_s": speed[name],
            "ratio_to_iid": speed[name] / speed["iid"],
            "efficiency": speed[name] / speed["iid"] * decoded[name] / decoded["iid"] if name in decoded else None,
            "ratio_to_hf_generate": speed[name] / speed[HF] if HF in speed else None,
            "rows_per_step": decoded[name] / stats[name].steps if name in stats else None,
            "decoded_tokens": decoded.get(name),
            "response_tokens": case.response,
            "repeats": repeats,
        }
        for name in functions
    ]


def alternate(functions: dict[str, Callable[[int], int]], response: int, repeats: int) -> dict[str, float]:
    """Median trajectory tokens per second of each function of the response length. The functions take turns."""
    speed: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(16)  # uncounted
    for _ in range(repeats):
        for name, function in functions.items():
            start = report.clock()
            tokens = function(response)
            speed[name].append(tokens / (report.clock() - start))
    return {name: statistics.median(found) for name, found in speed.items()}


if __name__ == "__main__":
    main()
