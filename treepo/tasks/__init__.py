"""Tasks: where problems come from and what a response is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One item of a task: a prompt, and what the reward needs to judge a response to it."""

    id: str  # unique in its split; seeds are derived from it
    prompt: str  # as the user wrote it; `Task.encode` applies a chat template
    answer: str
    columns: Mapping[str, Any] = field(
        default_factory=dict, hash=False
    )  # more that the reward may need, as JSON values


class Task(Protocol):
    """A task is its settings: a frozen model whose methods are pure functions."""

    @property
    def isolated(self) -> bool:
        """Whether `reward` runs code that may hang or crash, so that it gets a bounded process of its own."""
        ...

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, in a fixed order; raises `TaskError` for data that cannot be used."""
        ...

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        """Prompt token ids, ready for the model to continue."""
        ...

    def reward(self, problem: Problem, response: str) -> float:
        """What `response` (without special tokens) is worth; built-in tasks give 1.0 if right, else 0.0."""
        ...

    def final_answer(self, response: str) -> str | None:
        """The answer that a response ends with, for majority votes; None if it has none."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """A task that can also bring up a new model: it has a tokenizer and worked examples."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer for prompts and responses, with an EOS token."""
        ...

    def lesson(self, seed: int, index: int) -> tuple[Problem, str]:
        """The index-th worked example of a stream keyed by `seed`: a problem and a (possibly faulty) response."""
        ...
