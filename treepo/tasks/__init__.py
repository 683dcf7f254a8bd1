"""Tasks: they have the problems, and they compute the reward of a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One item of a task: a prompt, and what the reward function needs to judge a response."""

    id: str  # unique in its split; seeds depend on it
    prompt: str  # without chat template; `Task.encode` applies it
    answer: str
    columns: Mapping[str, Any] = field(
        default_factory=dict, hash=False
    )  # further data for the reward function, as JSON values


class Task(Protocol):
    """The problems, their encoding and their rewards. All methods are pure functions."""

    @property
    def isolated(self) -> bool:
        """Whether `reward` may hang or crash. If so, it runs in worker processes with limits on time and memory."""
        ...

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, in a fixed order. Raises `TaskError` for data that cannot be used."""
        ...

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        """Token ids of the prompt, which the model continues."""
        ...

    def reward(self, problem: Problem, response: str) -> float:
        """The reward of `response` (a text without special tokens). Built-in tasks give 1.0 if right, else 0.0."""
        ...

    def final_answer(self, response: str) -> str | None:
        """The final answer in a response, for majority votes; None if it has none."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """A task that can also warm up a new model: it has a tokenizer and worked examples."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer for prompts and responses, with an EOS token."""
        ...

    def lesson(self, seed: int, index: int) -> tuple[Problem, str]:
        """Worked example number `index` of a stream keyed by `seed`: a problem and a response, which may be wrong."""
        ...
