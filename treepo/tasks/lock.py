"""A generated task: turn all dials of a lock to zero. A mistake costs moves, but can be corrected.

    prompt    3085?
    response  a-2985;a-1885;a-0785;b+0095;c-0004;c+0013;c-0004;d-0007;d-0000;

A move turns one dial (a, b, ...) up or down by its gear, modulo the number of positions. It also drags the next dial
by one position in the same direction. After each move the response has the new state of the lock, so the next move
depends only on the last line. A response is right if its moves open the lock and are not too many. So another move can
correct a wrong one (c+ above), as long as moves are left. The reward ignores the states; they are notes of the model.
But a model that notes a wrong state will choose wrong moves.

The teacher always turns the right dial, but it has habits: at some positions it usually turns the dial the wrong way.
The model learns these habits too. So its most frequent move is often wrong, and which move is right depends on the
dial and its position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import gcd
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from treepo.seeds import generator
from treepo.settings import Settings
from treepo.tasks import Problem, Split
from treepo.tasks.generated import Generated, character_tokenizer, permuted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIALS = "abcde"
CHARACTERS = "0123456789+-;?" + DIALS

Lock = tuple[int, ...]  # the position of each dial
Move = tuple[int, int]  # dial, +1 or -1


class LockTask(Settings):
    """Locks to open, with a tokenizer and a teacher that has bad habits (a `Task` and a `Teacher`).

    A permutation, keyed by `seed`, numbers all locks that need `shortest_min` to `shortest_max` moves: the first
    `test_problems` are the test split, the next `train_problems` the train split. So no problem occurs twice.
    """

    kind: Literal["lock"] = "lock"
    dials: int = Field(4, ge=1, le=len(DIALS), description="Dials of a lock.")
    positions: int = Field(10, ge=3, le=10, description="Positions of a dial.")
    gear: int = Field(
        3,
        ge=1,
        le=9,
        description="A move turns the first dial by 1 position, and each further dial by `gear` times as many "
        "positions as the dial before (modulo positions). 1: all dials turn alike, which is easier.",
    )
    drag: int = Field(1, ge=0, le=9, description="Positions by which a turn also moves the next dial; 0: not at all.")
    shortest_min: int = Field(6, ge=1, description="The easiest locks can be opened in this many moves.")
    shortest_max: int = Field(8, ge=1, description="The hardest locks need this many moves.")
    moves: int = Field(16, ge=1, description="A response with more moves is wrong.")
    train_problems: int = Field(2_000, ge=1, description="Problems to train on.")
    test_problems: int = Field(256, ge=1, description="Problems held out for evaluation.")
    seed: int = Field(0, description="Seed for the order of the locks and their splits.")
    habit: float = Field(
        0.7,
        ge=0,
        le=1,
        description="How often the teacher turns a dial the wrong way: for each dial and position, the probability is "
        "drawn once, uniformly from 0 to this value.",
    )

    @model_validator(mode="after")
    def _enough_locks(self) -> LockTask:
        if gcd(self.gear, self.positions) > 1:
            raise ValueError(
                f"gear {self.gear} and positions {self.positions} have a common divisor, so some locks never open: "
                "choose another gear, such as 1"
            )
        if self.shortest_min > self.shortest_max:
            raise ValueError(f"shortest_min {self.shortest_min} is above shortest_max {self.shortest_max}")
        if self.shortest_max > self.moves:
            raise ValueError(
                f"a lock that needs shortest_max {self.shortest_max} moves cannot be opened in {self.moves}"
            )
        wanted = self.test_problems + self.train_problems
        if wanted > len(self.locks):
            raise ValueError(
                f"only {len(self.locks)} such locks exist, but test_problems + train_problems is {wanted}"
                ": raise dials or positions, widen shortest_min to shortest_max, or ask for fewer problems"
            )
        return self

    @property
    def locks(self) -> Sequence[Lock]:
        """All locks that these settings allow."""
        return _locks(self.gears, self.positions, self.drag, self.shortest_min, self.shortest_max)

    @property
    def gears(self) -> tuple[int, ...]:
        """Positions by which a move turns each dial."""
        return tuple(pow(self.gear, dial, self.positions) for dial in range(self.dials))

    @property
    def isolated(self) -> bool:
        return False

    def problems(self, split: Split) -> Sequence[Problem]:
        count = self.test_problems if split == "test" else self.train_problems
        return Generated(count, lambda index: self._problem(split, index))

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        return list(tokenizer.encode(problem.prompt))

    def reward(self, problem: Problem, response: str) -> float:
        made = self._moves(response)
        if made is None or len(made) > self.moves:
            return 0.0
        lock = _start(problem)
        for move in made:
            lock = self.turn(lock, move)
        return float(not any(lock))

    def final_answer(self, response: str) -> str | None:
        """The moves without the states, e.g. `a-a-b+`."""
        made = self._moves(response)
        return None if made is None else _spell(made)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return character_tokenizer(CHARACTERS)

    def lesson(self, seed: int, index: int) -> tuple[Problem, str]:
        """A random train problem and the teacher's response. It opens the lock, but perhaps in too many moves.

        Its states are always right. A slip is a turn the wrong way. After `moves` moves the teacher makes no slips.
        """
        random = generator(seed, "lesson", index)
        problem = self.problems("train")[random.randrange(self.train_problems)]
        lock = _start(problem)
        written: list[str] = []
        while any(lock):
            dial, by = self.good_move(lock)
            if len(written) < self.moves and random.random() < self.chance_of_slip(dial, lock[dial]):
                by = -by
            lock = self.turn(lock, (dial, by))
            written.append(f"{_spell([(dial, by)])}{''.join(map(str, lock))};")
        return problem, "".join(written)

    def chance_of_slip(self, dial: int, position: int) -> float:
        """The probability that the teacher turns the dial the wrong way at this position."""
        return self.habit * _draw(self.seed, dial, position)

    def turn(self, lock: Lock, move: Move) -> Lock:
        """The lock after a move."""
        dial, by = move
        turns = {dial: by * self.gears[dial], dial + 1: by * self.drag}
        return tuple((position + turns.get(i, 0)) % self.positions for i, position in enumerate(lock))

    def good_move(self, lock: Lock) -> Move:
        """The first move of a shortest solution of a lock that is not open.

        Only moves of a dial and of the dial before it turn that dial. So each dial needs a fixed number of turns, in
        any order. Turning the first dial that is not at 0 in the shorter direction is part of a shortest solution.
        """
        dial = next(i for i, position in enumerate(lock) if position)
        turns = lock[dial] * pow(self.gears[dial], -1, self.positions) % self.positions
        return dial, -1 if 2 * turns <= self.positions else 1

    def _moves(self, response: str) -> list[Move] | None:
        """The moves of a response; None if it does not have the right form."""
        letters = DIALS[: self.dials]
        line = rf"[{letters}][+-][0-9]{{{self.dials}}};"
        if not re.fullmatch(f"({line})+", response):
            return None
        return [(letters.index(made[0]), 1 if made[1] == "+" else -1) for made in response.split(";")[:-1]]

    def _problem(self, split: Split, index: int) -> Problem:
        offset = 0 if split == "test" else self.test_problems
        start = lock = self.locks[permuted(offset + index, len(self.locks), self.seed, "lock")]
        way: list[Move] = []
        while any(lock):
            way.append(self.good_move(lock))
            lock = self.turn(lock, way[-1])
        return Problem(f"{split}-{index}", "".join(map(str, start)) + "?", _spell(way))


def _start(problem: Problem) -> Lock:
    return tuple(map(int, problem.prompt.removesuffix("?")))


def _spell(moves: Sequence[Move]) -> str:
    return "".join(DIALS[dial] + "+-"[by < 0] for dial, by in moves)


@lru_cache(1 << 10)
def _draw(seed: int, dial: int, position: int) -> float:
    return generator(seed, "habit", dial, position).random()


@lru_cache(8)
def _locks(gears: tuple[int, ...], positions: int, drag: int, fewest: int, most: int) -> Sequence[Lock]:
    """Locks that need `fewest` to `most` moves, computed from the turns that each dial needs."""
    ways = range(-(positions // 2), (positions + 1) // 2)  # one for each position of a dial
    found = []
    for turns in product(ways, repeat=len(gears)):
        if fewest <= sum(map(abs, turns)) <= most:
            dragged = (0, *turns[:-1])
            moved = [turn * gear + drag * d for turn, gear, d in zip(turns, gears, dragged, strict=True)]
            found.append(tuple(-by % positions for by in moved))
    return found
