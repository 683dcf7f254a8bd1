"""A task from a list of problems and a reward function, for use from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from treepo.tasks import Problem, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[[Problem, str], float]
"""The reward of a response (a text without special tokens) to a problem."""


class ListedTask:
    """A task of `problems` to train on and a Python function `reward(problem, response)`.

    `test`: held-out problems. `encode(tokenizer, problem)`: token ids of the prompt; default: the tokenizer's chat
    template if it has one, else the plain prompt. `final_answer(response)`: the final answer, for majority votes.
    `reward` runs in this process: a leaf whose reward raises has no reward, but nothing stops a function that hangs.
    """

    isolated = False

    def __init__(
        self,
        problems: Sequence[Problem],
        reward: RewardFunction,
        *,
        test: Sequence[Problem] = (),
        encode: Callable[[PreTrainedTokenizerBase, Problem], list[int]] | None = None,
        final_answer: Callable[[str], str | None] | None = None,
    ) -> None:
        self._problems: dict[Split, Sequence[Problem]] = {"train": tuple(problems), "test": tuple(test)}
        self._reward, self._encode, self._final_answer = reward, encode, final_answer

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split."""
        return self._problems[split]

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        """Token ids of the prompt."""
        if self._encode is not None:
            return self._encode(tokenizer, problem)
        if not tokenizer.chat_template:
            return list(tokenizer.encode(problem.prompt))
        messages = [{"role": "user", "content": problem.prompt}]
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    def reward(self, problem: Problem, response: str) -> float:
        """The reward of `response`."""
        return self._reward(problem, response)

    def final_answer(self, response: str) -> str | None:
        """The final answer in a response."""
        return self._final_answer(response) if self._final_answer is not None else None
