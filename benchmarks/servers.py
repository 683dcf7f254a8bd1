"""Trees on vLLM against vLLM's own n = 16: trajectories per second, tokens computed again, and the cost of our side.

Needs the environment of `make venv-vllm`: `.venv-vllm/bin/python -m benchmarks.servers`. 8 prompts x 16 responses of
512 tokens each (no stop ids), forks spread over the depth, segments aligned to the blocks of the prefix cache. Seconds
are wall clock, because vLLM is several processes. The shapes take turns.

- `recomputed`: prefix tokens that were not in the cache, divided by generated tokens. The prompts are in the cache from
  the uncounted round.
- `client_cpu`: the share of this process in the CPU time of all processes. treepo and vLLM's front end run in it.
- `own_cpu`: the share of treepo alone. It is measured with the same trees on an engine that answers at once.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import report
from treepo.engines.scripted import ScriptedEngine, random_reply
from treepo.engines.settings import VLLMSettings
from treepo.engines.vllm.engine import VLLMEngine, VLLMStats
from treepo.models import causal_lm
from treepo.policies.branching import LevelBudget
from treepo.policies.stopping import EarlyStop
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import Tree

LEAVES, PROMPT, BLOCK, VOCABULARY = 16, 65, 32, 2048
COLUMNS = [
    *("shape", "trajectory_tokens_per_s", "ratio_to_n16", "sharing", "efficiency", "recomputed", "client_cpu"),
    *("own_cpu", "requests"),
]


def main() -> None:
    args = report.arguments(__doc__ or "")
    prompts, response, segments = (2, 128, (32, 64)) if args.quick else (8, 512, (64, 128, 256))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=PROMPT + response,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = causal_lm.prepare(Qwen2ForCausalLM(config).eval())
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (prompts, PROMPT), generator=rng).tolist()
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        engine = VLLMEngine(model, VLLMSettings(kind="vllm", block_tokens=BLOCK, max_num_seqs=128), Path(folder))
        try:
            runner.run(engine.start())
            results = measure(engine, runner, ids, response, segments, 1 if args.quick else args.repeats)
        finally:
            runner.run(engine.close())
    report.finish("servers", results, args, columns=COLUMNS)


def measure(
    engine: VLLMEngine,
    runner: asyncio.Runner,
    ids: list[list[int]],
    response: int,
    segments: tuple[int, ...],
    repeats: int,
) -> list[dict[str, Any]]:
    """A result for n = 16 and for trees of each segment length."""
    flat = len(ids) * LEAVES * response

    def many(seed: int) -> int:
        """vLLM's own parallel sampling; returns the generated tokens."""
        return runner.run(parallel(engine, ids, response, seed))

    def trees(length: int, seed: int) -> int:
        grown = runner.run(sampler(engine, length, response).grow_all([(str(i), p) for i, p in enumerate(ids)], seed))
        if sum(tree.flat_tokens for tree in grown) < 0.95 * flat:
            raise RuntimeError("the trees do not have the trajectories that were asked for")
        return sum(tree.unique_tokens for tree in grown)

    shapes: dict[str, Callable[[int], int]] = {f"n = {LEAVES}": many}
    shapes |= {f"trees, {response // length} x {length}": partial(trees, length) for length in segments}
    for function in shapes.values():
        function(999)  # uncounted
    found: dict[str, list[dict[str, float]]] = {name: [] for name in shapes}
    for repeat in range(repeats):
        for name, function in shapes.items():
            engine.stats = VLLMStats()
            own, others, start = time.process_time(), children(), time.perf_counter()
            unique = function(repeat)
            seconds, own, others = time.perf_counter() - start, time.process_time() - own, children() - others
            stats = engine.stats
            found[name].append(
                {
                    "trajectory_tokens_per_s": flat / seconds,
                    "sharing": flat / unique,
                    "recomputed": stats.computed_again / unique,
                    "client_cpu": own / (own + others),
                    "requests": float(stats.requests),
                    "cpu_s": own + others,
                }
            )
            print(name, found[name][-1], file=sys.stderr, flush=True)
    results = []
    for name, runs in found.items():
        row: dict[str, Any] = {"shape": name} | {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row["ratio_to_n16"] = row["trajectory_tokens_per_s"] / results[0]["trajectory_tokens_per_s"] if results else 1.0
        row["efficiency"] = row["ratio_to_n16"] / row["sharing"]
        row["own_cpu"] = None
        if name in shapes and results:
            length = segments[len(results) - 1]
            row["own_cpu"] = own_seconds(ids, length, response) / row["cpu_s"]
        results.append(row | {"prompts": len(ids), "response_tokens": response, "block": BLOCK, "repeats": repeats})
    return results


def sampler(engine: Any, length: int, response: int) -> Sampler:
    """Trees with forks spread over the depth, whose paths all have the full length."""
    shape = SamplerSettings(
        width=LEAVES,
        segment_tokens=length,
        max_depth=response // length,
        align_segments=True,
        branching=LevelBudget(divergence="spread", first_divergence=None),
        stopping=EarlyStop(repetition_count=0),
    )
    return Sampler(engine, shape, lambda _: "", ())


async def parallel(engine: VLLMEngine, ids: list[list[int]], response: int, seed: int) -> int:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    async def one(i: int, prompt: list[int]) -> int:
        params = SamplingParams(
            n=LEAVES,
            max_tokens=response,
            seed=seed * 1000 + i,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for output in engine.llm.generate(TokensPrompt(prompt_token_ids=prompt), params, f"n-{seed}-{i}"):
            last = output
        return sum(len(found.token_ids) for found in last.outputs)

    return sum(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(ids))))


def own_seconds(ids: list[list[int]], length: int, response: int) -> float:
    """CPU seconds of treepo itself for the same trees, on an engine whose replies cost next to nothing."""
    scripted = ScriptedEngine(random_reply(VOCABULARY), granularity=BLOCK)
    start = time.process_time()
    trees: list[Tree] = sampler(scripted, length, response).sample([(str(i), p) for i, p in enumerate(ids)], 0)
    whole = time.process_time() - start
    start, reply = time.process_time(), random_reply(VOCABULARY)
    for tree in trees:
        for node in tree.nodes[1:]:
            reply([0] * node.start, len(node.tokens), node.seed)
    return max(0.0, whole - (time.process_time() - start))


def children() -> float:
    """CPU seconds of all processes below this one."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


if __name__ == "__main__":
    main()
