r"""A small generated task that needs no download: run a five-step program modulo 10 and box the result.

    prompt    x=6;x-=2;,x-=5;,x*=3;,x+=4;,x-=4;,?
    response  6-2=4;4-5=9;9*3=7;7+4=1;1-4=7;\boxed{7}

Each step takes six characters in the prompt and six in the response. So a step of the response has its operator and
operand at a constant distance, which a two-layer model learns in seconds. The model first learns from a teacher that
makes mistakes (slips). It is then usually wrong and sometimes right: a good start for reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from treepo.seeds import generator
from treepo.settings import Settings
from treepo.tasks import Problem, Split
from treepo.tasks.generated import Generated, character_tokenizer, permuted
from treepo.tasks.math import boxed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPERATORS = "+-*"
CHARACTERS = "0123456789+-*=x;,?\\boed{}"  # each is one token; the x in `\boxed` is the same token
MODULUS = 10

Program = tuple[int, tuple[tuple[str, int], ...]]  # the start and its (operator, operand) steps


class ProgramTask(Settings):
    """Programs over one digit, with a tokenizer and a teacher that makes mistakes (a `Task` and a `Teacher`).

    A permutation, keyed by `seed`, numbers all programs: the first `test_problems` are the test split, the next
    `train_problems` the train split. So no problem occurs twice.
    """

    kind: Literal["program"] = "program"
    operations: int = Field(5, ge=1, le=12, description="Steps of a program.")
    operand_min: int = Field(2, ge=0, le=9, description="Smallest operand.")
    operand_max: int = Field(5, ge=0, le=9, description="Largest operand.")
    train_problems: int = Field(100_000, ge=1, description="Problems to train on.")
    test_problems: int = Field(256, ge=1, description="Problems held out for evaluation.")
    seed: int = Field(0, description="Seed for the order of the programs and their splits.")
    slip_plus: float = Field(
        0.10, ge=0, le=1, description="How often the teacher computes a + b + 1 for a + b, 0 to 1."
    )
    slip_minus: float = Field(0.55, ge=0, le=1, description="How often the teacher computes b - a for a - b, 0 to 1.")
    slip_times: float = Field(0.35, ge=0, le=1, description="How often the teacher computes a + b for a * b, 0 to 1.")

    careful_lessons: int = Field(
        11_000,
        ge=0,
        description="Number of lessons without slips at the start of the warm-up. A model learns to compute much "
        "faster without slips, and learns the slips afterwards.",
    )

    @model_validator(mode="after")
    def _enough_programs(self) -> ProgramTask:
        if self.operand_min > self.operand_max:
            raise ValueError(f"operand_min {self.operand_min} is above operand_max {self.operand_max}")
        wanted = self.test_problems + self.train_problems
        if wanted > self.programs:
            raise ValueError(
                f"only {self.programs} such programs exist, but test_problems + train_problems is {wanted}"
                ": raise operations or ask for fewer problems"
            )
        return self

    @property
    def programs(self) -> int:
        """How many programs these settings allow."""
        return int(MODULUS * self._choices**self.operations)

    @property
    def _choices(self) -> int:
        return len(OPERATORS) * (self.operand_max - self.operand_min + 1)

    @property
    def isolated(self) -> bool:
        return False

    def problems(self, split: Split) -> Sequence[Problem]:
        count = self.test_problems if split == "test" else self.train_problems
        return Generated(count, lambda index: self._problem(split, index))

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        return list(tokenizer.encode(problem.prompt))

    def reward(self, problem: Problem, response: str) -> float:
        return float(boxed(response) == problem.answer)

    def final_answer(self, response: str) -> str | None:
        return boxed(response)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return character_tokenizer(CHARACTERS)

    def lesson(self, seed: int, index: int) -> tuple[Problem, str]:
        """A random train problem and the teacher's response. Its form is always right, but its steps may be wrong."""
        random = generator(seed, "lesson", index)
        rank = random.randrange(self.train_problems)
        value, steps = self._program("train", rank)
        written = []
        for operator, operand in steps:
            result = apply(operator, value, operand)
            if index >= self.careful_lessons:
                result = self._slip(random, operator, value, operand)
            written.append(f"{value}{operator}{operand}={result};")
            value = result
        return self.problems("train")[rank], "".join(written) + f"\\boxed{{{value}}}"

    def _slip(self, random: Random, operator: str, a: int, b: int) -> int:
        slips = {"+": (self.slip_plus, a + b + 1), "-": (self.slip_minus, b - a), "*": (self.slip_times, a + b)}
        chance, wrong = slips[operator]
        return wrong % MODULUS if random.random() < chance else apply(operator, a, b)

    def _program(self, split: Split, index: int) -> Program:
        """Program number `index` of a split, 0 <= index < problems of the split."""
        offset = 0 if split == "test" else self.test_problems
        code, start = divmod(permuted(offset + index, self.programs, self.seed, "program"), MODULUS)
        steps = []
        for _ in range(self.operations):
            code, choice = divmod(code, self._choices)
            operand, operator = divmod(choice, len(OPERATORS))
            steps.append((OPERATORS[operator], self.operand_min + operand))
        return start, tuple(steps)

    def _problem(self, split: Split, index: int) -> Problem:
        start, steps = self._program(split, index)
        value = start
        for operator, operand in steps:
            value = apply(operator, value, operand)
        prompt = f"x={start};" + "".join(f"x{operator}={operand};," for operator, operand in steps) + "?"
        return Problem(f"{split}-{index}", prompt, str(value))


def apply(operator: str, a: int, b: int) -> int:
    """`a operator b` modulo 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % MODULUS
