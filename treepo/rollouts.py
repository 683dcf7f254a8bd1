"""From problems to scored trees: a policy at work on a task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from treepo.distributed import Processes
from treepo.engines import Engine
from treepo.errors import ConfigError, TaskError
from treepo.event_loop import EventLoop
from treepo.sampler import Sampler, SamplerSettings, TreeSampler, together
from treepo.tasks import Problem, Task
from treepo.tasks.scoring import Score, Scorer, ScoringSettings
from treepo.tree import ScoredTree, Stop, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
T = TypeVar("T")
Keyed = tuple[str, Problem]
"""A key that is unique among what is sampled together, and a problem."""


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


@dataclass(frozen=True, slots=True)
class Sampled:
    """The scored trees of some problems, and how long they took."""

    trees: list[ScoredTree]
    sample_s: float  # until the last tree was complete
    score_s: float  # from then on: waiting for the rewards that were still missing


@dataclass(frozen=True)
class Actor:
    """A policy at work on a task: it encodes problems, has their trees grown, and scores the leaves.

    A context manager: `close` ends the scorer, the engine and their event loop.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    engine: Engine
    scorer: Scorer
    stop_ids: frozenset[int]  # every id that ends a response
    processes: Processes = field(default_factory=Processes)
    loop: EventLoop = field(default_factory=EventLoop)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        engine: Engine | None = None,
        scoring: ScoringSettings | None = None,
        stop_ids: frozenset[int] | None = None,
        processes: Processes | None = None,
    ) -> Self:
        """`model` at work on `task`.

        Default engine: the one in this process, which decodes on the model itself. Default `stop_ids`: those of the
        tokenizer and of the model's generation config.

        Raises `TaskError` if the rewards cannot be computed, `ConfigError` for a tokenizer without EOS, and
        `EngineError` if the engine does not start.
        """
        from treepo.engines.local.engine import LocalEngine
        from treepo.models import causal_lm

        if stop_ids is None:
            stop_ids = causal_lm.stop_ids(model, tokenizer)
        loop = EventLoop()
        engine = engine or LocalEngine(causal_lm.prepared(model))
        with ExitStack() as undo:
            undo.callback(loop.close)
            undo.callback(lambda: loop.run(engine.close()))
            loop.run(engine.start())
            scorer = Scorer(task, scoring or ScoringSettings())
            undo.pop_all()  # the actor's from now on
        return cls(task, tokenizer, model, engine, scorer, stop_ids, processes or Processes(), loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers of the scorer, the engine's connections and the event loop."""
        with ExitStack() as rest:
            rest.callback(self.loop.close)
            rest.callback(lambda: self.run(self.engine.close()))
            self.scorer.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work` on the engine's event loop."""
        return self.loop.run(work)

    def load_weights(self, version: int) -> None:
        """The model has changed: from now on the engine samples from it. All processes call this together.

        The main process goes first: where weights have to be sent, it sends them for all.
        """
        for turn in (True, False):
            if self.processes.main is turn:
                self.run(self.engine.load_weights(version))
            self.processes.wait()

    def sampler(self, settings: SamplerSettings) -> Sampler:
        """A sampler for this policy's engine and tokenizer."""
        return Sampler(self.engine, settings, self.decode, self.stop_ids)

    def encode(self, problem: Problem, response_tokens: int) -> list[int]:
        """Prompt token ids; raises `TaskError` for a prompt that leaves no room for a response of that many tokens."""
        prompt = self.task.encode(self.tokenizer, problem)
        if not prompt:
            raise TaskError(f"problem {problem.id}: the prompt has no tokens")
        if len(prompt) + response_tokens > self.engine.context:
            raise TaskError(
                f"problem {problem.id}: a prompt of {len(prompt)} tokens and a response of up to "
                f"{response_tokens} exceed the context of {self.engine.context}: drop the problem, or lower "
                "sampler.segment_tokens or sampler.max_depth"
            )
        return prompt

    def decode(self, tokens: Sequence[int]) -> str:
        """Response text without special tokens."""
        # transformers checks the type of every element of a list, which takes longer than decoding it.
        return str(self.tokenizer.decode(np.array(tokens, np.int64), skip_special_tokens=True))

    def sample(
        self,
        problems: Sequence[Keyed],
        sampler: TreeSampler | Sequence[TreeSampler],
        seed: int,
        *,
        progress: float = 0.0,
        on_progress: Callable[[int, int], None] | None = None,
        on_tree: Callable[[int, ScoredTree], None] | None = None,
    ) -> Sampled:
        """A scored tree for every (unique key, problem), in their order; `sampler` is one for all or one for each.

        The leaves of a tree are scored as soon as it is complete, while the others are still growing. After each tree
        is scored, `on_tree(index, scored tree)` and then `on_progress(trees done, of how many)` are called. A leaf
        that ended in an engine error has no reward. Neither has one whose reward raised, hung or was no number.
        """
        start = sampled = time.perf_counter()
        samplers = sampler if isinstance(sampler, Sequence) else [sampler] * len(problems)
        done = count(1)

        async def one(index: int, key: str, problem: Problem, grower: TreeSampler, prompt: list[int]) -> ScoredTree:
            nonlocal sampled
            tree = await grower.grow(prompt, key, seed, progress)
            sampled = time.perf_counter()
            scored = await self._score(problem, tree)
            if on_tree:
                on_tree(index, scored)
            if on_progress:
                on_progress(next(done), len(problems))
            return scored

        async def all_of_them() -> list[ScoredTree]:
            return await together([one(i, *asked) for i, asked in self.processes.mine(list(enumerate(asked_for)))])

        asked_for = [
            (key, problem, grower, self.encode(problem, grower.response_tokens))
            for (key, problem), grower in zip(problems, samplers, strict=True)
        ]
        trees = self.run(all_of_them())
        return Sampled(self.processes.everyones(trees), sampled - start, time.perf_counter() - sampled)

    async def _score(self, problem: Problem, tree: Tree) -> ScoredTree:
        leaves = tree.leaves()
        asked = [leaf for leaf in leaves if tree.nodes[leaf].stop is not Stop.ERROR]
        scores = await self.scorer.score_async([(problem, self.decode(tree.response(leaf))) for leaf in asked])
        known = dict(zip(asked, scores, strict=True))
        found = {leaf: known.get(leaf) or Score(None, tree.nodes[leaf].error or "the engine failed") for leaf in leaves}
        reasons = {leaf: score.reason for leaf, score in found.items() if score.reason}
        return ScoredTree(problem.id, tree, [score.reward for score in found.values()], reasons)
