"""The actor: everything between a list of problems and scored rollouts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treepo.distributed import Processes
from treepo.engines import Engine
from treepo.errors import ConfigError, TaskError
from treepo.models import causal_lm
from treepo.sampler import Sampler, SamplerSettings, together
from treepo.tasks import Problem, Task
from treepo.tasks.scoring import Score, Scorer
from treepo.tree import ScoredTree, Stop, Tree

log = logging.getLogger(__name__)
T = TypeVar("T")


def require_room(engine: Engine, sampler: SamplerSettings) -> None:
    """Raise `ConfigError` if no response of `sampler` can fit the engine's context, or no tree its memory."""
    if sampler.response_tokens >= engine.context:
        raise ConfigError(
            f"sampler: {sampler.max_depth} segments of {sampler.segment_tokens} tokens make responses of "
            f"{sampler.response_tokens} tokens, but the context holds {engine.context} with the prompt: "
            "lower sampler.segment_tokens or sampler.max_depth"
        )
    if sampler.tree_tokens >= engine.tree_tokens:
        raise ConfigError(
            f"engine: a tree of {sampler.width} leaves of up to {sampler.response_tokens} tokens may come to "
            f"{sampler.tree_tokens}, and there is room for {engine.tree_tokens} with the prompt: raise "
            "engine.memory_gib, or lower engine.slots, the leaves (sampler.width, evaluate.samples) or the response "
            "budget"
        )
    if sampler.mode == "tree" and sampler.segment_tokens < 2 * engine.granularity > 2:
        log.warning(
            "sampler.segment_tokens=%d is less than two blocks of the engine's prefix cache (%d tokens each): up to a "
            "block is computed again for every segment; longer segments or smaller engine.block_tokens save that",
            *(sampler.segment_tokens, engine.granularity),
        )


@dataclass(frozen=True)
class Actor:
    """A policy at work on a task: encodes problems, grows their trees, scores the leaves.

    A context manager: `close` ends the scorer, the engine and their event loop, which is one for all calls, because
    an engine's connections belong to the loop that made them.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    engine: Engine
    scorer: Scorer
    # Spent so far: until the last tree was complete, and then on waiting for the rewards that were still missing.
    seconds: dict[str, float] = field(default_factory=lambda: {"sample": 0.0, "score": 0.0})
    processes: Processes = field(default_factory=Processes)
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers of the scorer, the engine's connections and the event loop."""
        with ExitStack() as rest:
            rest.callback(self.runner.close)
            rest.callback(lambda: self.run(self.engine.close()))
            self.scorer.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work` on the engine's event loop. Ctrl-C cancels it and raises `KeyboardInterrupt`."""
        return self.runner.run(work)

    def interrupt(self) -> None:
        """Cancel what runs on the event loop in another thread, if anything does."""
        loop = self.runner.get_loop()
        if loop.is_running():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])

    def load_weights(self, version: int) -> None:
        """The model has changed: from now on the engine samples from it; all processes call this together.

        The main process goes first: where weights have to be sent, it sends them for all.
        """
        for turn in (True, False):
            if self.processes.main is turn:
                self.run(self.engine.load_weights(version))
            self.processes.wait()

    def encode(self, problem: Problem, sampler: SamplerSettings) -> list[int]:
        """Prompt token ids; raises `TaskError` for a prompt that leaves no room for a response."""
        prompt = self.task.encode(self.tokenizer, problem)
        if not prompt:
            raise TaskError(f"problem {problem.id}: the prompt has no tokens")
        if len(prompt) + sampler.response_tokens > self.engine.context:
            raise TaskError(
                f"problem {problem.id}: a prompt of {len(prompt)} tokens and a response of up to "
                f"{sampler.response_tokens} exceed the context of {self.engine.context}: drop the problem, or lower "
                "sampler.segment_tokens or sampler.max_depth"
            )
        return prompt

    def decode(self, tokens: Sequence[int]) -> str:
        """Response text without special tokens."""
        # transformers checks the type of every element of a list, which takes longer than decoding it.
        return str(self.tokenizer.decode(np.array(tokens, np.int64), skip_special_tokens=True))

    def rollouts(
        self,
        problems: Sequence[tuple[str, Problem]],
        sampler: SamplerSettings | Sequence[SamplerSettings],
        seed: int,
        *,
        progress: float = 0.0,
        on_progress: Callable[[int, int], None] | None = None,
        on_rollout: Callable[[int, ScoredTree], None] | None = None,
    ) -> list[ScoredTree]:
        """A scored tree for every (unique key, problem), in their order; `sampler` is one for all or one for each.

        The leaves of a tree are scored as soon as it is complete, while the others are still growing. As trees are
        scored, in that order, `on_rollout(index, rollout)` and then `on_progress(trees done, of how many)` are called.
        A leaf that ended in an engine error has no reward; neither has one whose reward raised, hung or was no number.
        """
        start = sampled = time.perf_counter()
        shapes = [sampler] * len(problems) if isinstance(sampler, SamplerSettings) else sampler
        stop_ids = causal_lm.stop_ids(self.model, self.tokenizer)
        done = count(1)

        async def one(index: int, key: str, problem: Problem, shape: SamplerSettings, prompt: list[int]) -> ScoredTree:
            nonlocal sampled
            grower = Sampler(self.engine, shape, self.decode, stop_ids)
            tree = await grower.grow(prompt, key, seed, progress)
            sampled = time.perf_counter()
            rollout = await self._score(problem, tree)
            if on_rollout:
                on_rollout(index, rollout)
            if on_progress:
                on_progress(next(done), len(problems))
            return rollout

        async def all_of_them() -> list[ScoredTree]:
            return await together([one(i, *asked) for i, asked in self.processes.mine(list(enumerate(queries)))])

        queries = [
            (key, problem, shape, self.encode(problem, shape))
            for (key, problem), shape in zip(problems, shapes, strict=True)
        ]
        rollouts = self.run(all_of_them())
        self.seconds["sample"] += sampled - start
        self.seconds["score"] += time.perf_counter() - sampled
        return self.processes.everyones(rollouts)

    async def _score(self, problem: Problem, tree: Tree) -> ScoredTree:
        leaves = tree.leaves()
        asked = [leaf for leaf in leaves if tree.nodes[leaf].stop is not Stop.ERROR]
        scores = await self.scorer.score_async([(problem, self.decode(tree.response(leaf))) for leaf in asked])
        known = dict(zip(asked, scores, strict=True))
        found = {leaf: known.get(leaf) or Score(None, tree.nodes[leaf].error or "the engine failed") for leaf in leaves}
        reasons = {leaf: score.reason for leaf, score in found.items() if score.reason}
        return ScoredTree(problem.id, tree, [score.reward for score in found.values()], reasons)
