"""Microseconds of our own code per segment: trees of 16 leaves x 14 segments on an engine with ready replies.

    python -m benchmarks.scheduler [--quick] [--out FILE]

The replies are drawn beforehand, so that what is left is the sampler, the policies, the tree and asyncio. The engine's
own time is a field of its own (`engine_us_per_segment`) and not part of the others. CPU time, medians.

The rows with `text` decode segments of 512 tokens by a byte-level BPE tokenizer, which is trained here, and look for
boxes and repetition in them. Their last row compares responses of 14 and of 7 segments: `cost_of_double_length` is 2
where the cost of a response is linear in its length. The rows without have segments of 16 letters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from benchmarks import report
from treepo.engines import Segment
from treepo.engines.scripted import ScriptedEngine, ScriptedHandle
from treepo.policies.branching import LevelBudget
from treepo.sampler import Sampler, SamplerSettings

DEPTH, WIDTH, EOS = 14, 16, 0
LETTERS = [chr(97 + i % 26) for i in range(64)]
FORMULAS = (" $x^{%d}$", " \\frac{%d}{n+1}", " = %d.", "\n\nStep %d:", " so that %d", " \\\\", " 因此 %d。", " 🙂")

Decode = Callable[[Sequence[int]], str]


@dataclass
class Clock:
    """CPU seconds of a part of the work."""

    seconds: float = 0.0

    def of(self, function: Decode) -> Decode:
        """`function`, with its time counted."""

        def timed(tokens: Sequence[int]) -> str:
            start = time.process_time()
            text = function(tokens)
            self.seconds += time.process_time() - start
            return text

        return timed


class ReadyEngine(ScriptedEngine):
    """Answers with one of `segments`, chosen by the seed. Its own time, but for asyncio's, is in `clock`."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(lambda *_: ())
        self.segments, self.clock = segments, Clock()

    async def open(self, tree: Any, sampling: Any, stop_ids: Any, *args: Any, entropies: bool = False) -> ReadyHandle:
        """As every engine; nothing is looked at."""
        self.open_trees += 1
        return ReadyHandle(self, tree, frozenset(stop_ids), entropies)


class ReadyHandle(ScriptedHandle):
    """One tree of a `ReadyEngine`."""

    engine: ReadyEngine

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """A segment of the engine's, which is as long as was asked for."""
        await self.engine._turn(seed)
        start = time.process_time()
        segments = self.engine.segments
        found = segments[seed % len(segments)]
        found = Segment(found.tokens[:max_tokens], found.logprobs[:max_tokens], found.version)
        self.engine.clock.seconds += time.process_time() - start
        return found


def letters() -> tuple[list[list[int]], Decode]:
    """Segments of 16 letters, 6 % of which end in EOS, and a decoder that costs next to nothing."""
    rng = Random(0)
    pool = [[rng.randrange(1, 64) for _ in range(16)] for _ in range(1024)]

    def decode(tokens: Sequence[int]) -> str:
        return "".join([LETTERS[token] for token in tokens])

    return [*pool, *([*tokens[:7], EOS] for tokens in pool[:64])], decode


def written() -> tuple[list[list[int]], Decode]:
    """Segments of 512 tokens of generated text with formulas, and the decoder of a tokenizer that is trained on it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = Random(0)
    parts = [a + b for a in "bdfgklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    words = [" " + "".join(rng.choices(parts, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(4000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]

    def line() -> str:
        some = rng.choices(words, weights, k=400)
        for place in range(6, len(some), 7):
            formula = rng.choice(FORMULAS)
            some[place] = formula % rng.randrange(1000) if "%" in formula else formula
        return "".join(some)

    lines = [line() for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")  # noqa: S106
    ids = tokenizer.encode("".join(lines)).ids
    pool = [ids[start : start + 512] for start in range(0, len(ids) - 512, 512)]
    return pool, lambda tokens: str(whole.decode(np.array(tokens, np.int64), skip_special_tokens=True))


def measure(pool: Sequence[list[int]], decode: Decode, settings: SamplerSettings, trees: int, repeats: int) -> dict:
    """Costs per segment, token and response; medians over seeds."""
    segments = [Segment(tokens, [-0.5] * len(tokens), 0) for tokens in pool]
    rows = []
    for seed in range(repeats + 1):
        engine, decoding = ReadyEngine(segments), Clock()
        sampler = Sampler(engine, settings, decoding.of(decode), {EOS})
        start = time.process_time()
        grown = sampler.sample([(str(i), [1] * 64) for i in range(trees)], seed=seed)
        microseconds = 1e6 * (time.process_time() - start - engine.clock.seconds)
        count = sum(len(tree) - 1 for tree in grown)
        rows.append(
            {
                "segments": count,
                "us_per_segment": microseconds / count,
                "us_per_token": microseconds / sum(tree.unique_tokens for tree in grown),
                "us_per_response": microseconds / sum(len(tree.leaves()) for tree in grown),
                "decode_us_per_segment": 1e6 * decoding.seconds / count,
                "engine_us_per_segment": 1e6 * engine.clock.seconds / count,
            }
        )
    return {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}  # the first one warms up


def main() -> None:
    args = report.arguments(__doc__ or "", repeats=None)
    repeats = 3 if args.quick else 5

    def row(shape: str, pool: Sequence[list[int]], decode: Decode, trees: int, **given: Any) -> dict[str, Any]:
        segment = max(map(len, pool))
        settings = SamplerSettings(**{"width": WIDTH, "segment_tokens": segment, "max_depth": DEPTH} | given)
        found = measure(pool, decode, settings, trees, repeats)
        return {"shape": shape, "tokens": segment, "depth": settings.max_depth, "trees": trees, **found}

    def forks(first: int | tuple[int, int]) -> dict[str, Any]:
        return {"branching": LevelBudget(first_divergence=first)}

    trees = 64 if args.quick else 512
    results = [
        row("letters: tree, first divergence 2", *letters(), trees, **forks(2)),
        row("letters: tree, first divergence (2, 8)", *letters(), trees, **forks((2, 8))),
        row("letters: iid", *letters(), trees, mode="iid"),
    ]
    pool, decode = written()
    trees = 4 if args.quick else 32
    results.append(row("text: tree, first divergence 2", pool, decode, trees, **forks(2)))
    half = row("text: 16 paths", pool, decode, trees, max_depth=DEPTH // 2, **forks(WIDTH))
    whole = row("text: 16 paths", pool, decode, trees, **forks(WIDTH))
    whole["cost_of_double_length"] = whole["us_per_response"] / half["us_per_response"]
    report.finish("scheduler", [*results, half, whole], args, [*results[0], "cost_of_double_length"])


if __name__ == "__main__":
    main()
