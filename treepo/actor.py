"""The actor: everything between a list of problems and scored rollouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treepo import model as causal_lm
from treepo.engines import Engine
from treepo.errors import ConfigError, TaskError
from treepo.sampler import Sampler, SamplerSettings
from treepo.tasks import Problem, Task
from treepo.tasks.scoring import Score, Scorer
from treepo.tree import Rollout, Stop, Tree


def require_room(engine: Engine, sampler: SamplerSettings) -> None:
    """Raise `ConfigError` if no response of `sampler` can fit the engine's context."""
    if sampler.response_tokens >= engine.context:
        raise ConfigError(
            f"sampler: {sampler.max_depth} segments of {sampler.segment_tokens} tokens make responses of "
            f"{sampler.response_tokens} tokens, but the context holds {engine.context} with the prompt: "
            "lower sampler.segment_tokens or sampler.max_depth"
        )


@dataclass(frozen=True)
class Actor:
    """A policy at work on a task: encodes problems, grows their trees, scores the leaves."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    engine: Engine
    scorer: Scorer
    seconds: dict[str, float] = field(default_factory=lambda: {"sample": 0.0, "score": 0.0})  # spent so far

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
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def rollouts(
        self,
        problems: Sequence[tuple[str, Problem]],
        sampler: SamplerSettings,
        seed: int,
        *,
        progress: float = 0.0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """A scored tree for every (unique key, problem), in their order; `on_progress(trees done, of how many)`.

        A leaf that ended in an engine error has no reward; neither has one whose reward raised, hung or was no number.
        """
        start = time.perf_counter()
        prompts = [(key, self.encode(problem, sampler)) for key, problem in problems]
        grower = Sampler(self.engine, sampler, self.decode, causal_lm.stop_ids(self.model, self.tokenizer))
        done = count(1)
        trees = grower.sample(
            prompts,
            seed,
            progress=progress,
            on_tree=lambda *_: on_progress(next(done), len(prompts)) if on_progress else None,
        )
        sampled = time.perf_counter()
        scored = self._score([problem for _, problem in problems], trees, grower.failures)
        self.seconds["sample"] += sampled - start
        self.seconds["score"] += time.perf_counter() - sampled
        return scored

    def _score(
        self, problems: Sequence[Problem], trees: Sequence[Tree], failures: Mapping[tuple[str, int], str]
    ) -> list[Rollout]:
        asked = [
            (t, leaf)
            for t, tree in enumerate(trees)
            for leaf in tree.leaves()
            if tree.nodes[leaf].stop is not Stop.ERROR
        ]
        scores = self.scorer.score([(problems[t], self.decode(trees[t].response(leaf))) for t, leaf in asked])
        known = dict(zip(asked, scores, strict=True))
        rollouts = []
        for t, (problem, tree) in enumerate(zip(problems, trees, strict=True)):
            found = {leaf: known.get((t, leaf)) or Score(None, failures[tree.key, leaf]) for leaf in tree.leaves()}
            reasons = {leaf: score.reason for leaf, score in found.items() if score.reason}
            rollouts.append(Rollout(problem.id, tree, [score.reward for score in found.values()], reasons))
        return rollouts
