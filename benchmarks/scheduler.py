"""Microseconds of our own code per segment: 512 trees x 16 leaves x 14 segments on the scripted engine.

    python -m benchmarks.scheduler [--quick] [--out FILE]

The engine's replies are drawn beforehand, so that what is left is the sampler, the policies, the tree and asyncio.
Every segment decodes the whole response so far to look for an answer and for repetition, as in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from random import Random

from benchmarks import report
from treepo.engines.scripted import ScriptedEngine
from treepo.policies.branching import LevelBudget
from treepo.sampler import Sampler, SamplerSettings

SEGMENT, DEPTH, WIDTH, EOS = 16, 14, 16, 0
LETTERS = [chr(97 + i % 26) for i in range(64)]


def main() -> None:
    args = report.arguments(__doc__ or "", repeats=None)
    rng = Random(0)
    pool = [[rng.randrange(1, 64) for _ in range(SEGMENT)] for _ in range(1024)]
    replies = [*pool, *([*tokens[:7], EOS] for tokens in pool[:64])]  # 6 % of the segments end in EOS

    def reply(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:  # noqa: ARG001
        return replies[seed % len(replies)]

    def decode(tokens: Sequence[int]) -> str:
        return "".join([LETTERS[token] for token in tokens])

    results = []
    for mode, first in (("tree", 2), ("tree", (2, 8)), ("iid", 2)):
        settings = SamplerSettings(
            mode=mode,
            width=WIDTH,
            segment_tokens=SEGMENT,
            max_depth=DEPTH,
            branching=LevelBudget(first_divergence=first),
        )
        trees = 64 if args.quick else 512
        per_segment = []
        for repeat in range(3 if args.quick else 5):
            sampler = Sampler(ScriptedEngine(reply), settings, decode, {EOS})
            start = time.process_time()
            grown = sampler.sample([(str(i), [1] * 64) for i in range(trees)], seed=repeat)
            seconds = time.process_time() - start
            segments = sum(len(tree) - 1 for tree in grown)
            per_segment.append(1e6 * seconds / segments)
        shape = mode if mode == "iid" else f"{mode}, first divergence {first}"
        results.append(
            {"shape": shape, "trees": trees, "segments": segments, "us_per_segment": statistics.median(per_segment)}
        )
    report.finish("scheduler", results, args)


if __name__ == "__main__":
    main()
