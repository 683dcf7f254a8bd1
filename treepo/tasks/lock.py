r"""A generated task in which mistakes cost moves, not the answer: turn all dials of a lock to zero.

    prompt    3970?
    response  a-2870;a-1770;a-0670;b+0780;b+0890;b+0900;b+0010;c-0009;d+0000;

A move turns one dial (a, b, ...) by one, up or down around the lock's positions, and drags the next one along in the
same direction; then comes the state of the lock, so that a line follows from the line before alone. A response is right
if its moves open the lock and are not too many. So a wrong move can be made good by two more, as long as moves are
left: an early mistake is no verdict, as it is in a program. The states are the model's own notes: only moves are
judged, but whoever notes a wrong state loses his way.

The teacher turns the right dial, but has habits: at some places he mostly turns it the wrong way. A model learns them
with the rest, so that what is right is not what it does most, and differs from place to place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
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
    """Locks to open, with a tokenizer and an absent-minded teacher of their own (a `Task` and a `Teacher`).

    All locks of the wanted distance are numbered by a permutation that `seed` keys: the first `test_problems` are the
    test split, the next `train_problems` the train split. So no problem occurs twice, within a split or across.
    """

    kind: Literal["lock"] = "lock"
    dials: int = Field(4, ge=1, le=len(DIALS), description="Dials of a lock.")
    positions: int = Field(8, ge=3, le=10, description="Positions of a dial.")
    drag: int = Field(1, ge=0, le=9, description="Positions by which a dial drags the next one; 0: not at all.")
    shortest_min: int = Field(6, ge=1, description="Fewest moves that a lock needs.")
    shortest_max: int = Field(8, ge=1, description="Most moves that a lock needs.")
    moves: int = Field(16, ge=1, description="Most moves of a right response.")
    train_problems: int = Field(1_400, ge=1, description="Problems to train on; generated when asked for.")
    test_problems: int = Field(256, ge=1, description="Problems held out for evaluation.")
    seed: int = Field(0, description="Which locks go to which split, and their order.")
    habit: float = Field(
        0.8,
        ge=0,
        le=1,
        description="The teacher's worst habit: for each dial and position, the chance that he turns it the wrong way "
        "is drawn once, uniformly from 0 to this.",
    )

    @model_validator(mode="after")
    def _enough_locks(self) -> LockTask:
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
        return _locks(self.dials, self.positions, self.drag, self.shortest_min, self.shortest_max)

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
        lock: Lock = tuple(map(int, problem.prompt.removesuffix("?")))
        for move in made:
            lock = self.turn(lock, move)
        return float(not any(lock))

    def final_answer(self, response: str) -> str | None:
        """The moves without the notes: `a-a-b+`."""
        made = self._moves(response)
        return None if made is None else _spell(made)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return character_tokenizer(CHARACTERS)

    def lesson(self, seed: int, index: int) -> tuple[Problem, str]:
        """A random train problem and the teacher's response, which opens the lock, but maybe in too many moves.

        Its states are always right. A slip is a move drawn at random; after `moves` moves the teacher slips no more.
        """
        random = generator(seed, "lesson", index)
        problem = self.problems("train")[random.randrange(self.train_problems)]
        lock: Lock = tuple(map(int, problem.prompt.removesuffix("?")))
        written: list[str] = []
        while any(lock):
            dial, by = self.good_move(lock)
            if len(written) < self.moves and random.random() < self.chance_of_slip(dial, lock[dial]):
                by = -by
            lock = self.turn(lock, (dial, by))
            written.append(f"{_spell([(dial, by)])}{''.join(map(str, lock))};")
        return problem, "".join(written)

    def chance_of_slip(self, dial: int, position: int) -> float:
        """How often the teacher turns a dial at a position the wrong way."""
        return self.habit * _draw(self.seed, dial, position)

    def turn(self, lock: Lock, move: Move) -> Lock:
        """The lock after a move."""
        return _turn(lock, move, self.positions, self.drag)

    def good_move(self, lock: Lock) -> Move:
        """The first move of a shortest way to open a lock that is not open.

        Only its own moves and those of the dials before it turn a dial. So each dial has a number of turns that it
        needs whatever their order, and turning the first wrong dial the shorter way round is part of a shortest way.
        """
        dial = next(i for i, position in enumerate(lock) if position)
        return dial, -1 if 2 * lock[dial] <= self.positions else 1

    def _moves(self, response: str) -> list[Move] | None:
        """The moves of a response; None if it is not of the form."""
        letters = DIALS[: self.dials]
        line = rf"[{letters}][+-][0-9]{{{self.dials}}};"
        if not re.fullmatch(f"({line})+", response, flags=re.ASCII):
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


def _spell(moves: Sequence[Move]) -> str:
    return "".join(DIALS[dial] + "+-"[by < 0] for dial, by in moves)


def _turn(lock: Lock, move: Move, positions: int, drag: int) -> Lock:
    dial, by = move
    turns = {dial: by, dial + 1: by * drag}
    return tuple((position + turns.get(i, 0)) % positions for i, position in enumerate(lock))


@lru_cache(1 << 10)
def _draw(seed: int, dial: int, position: int) -> float:
    return generator(seed, "habit", dial, position).random()


@lru_cache(8)
def _locks(dials: int, positions: int, drag: int, shortest_min: int, shortest_max: int) -> Sequence[Lock]:
    """Locks that need so many moves, found from the turns that each dial needs: -(positions // 2) and up, in order."""
    found = []
    for turns in product(range(-(positions // 2), (positions + 1) // 2), repeat=dials):
        if shortest_min <= sum(map(abs, turns)) <= shortest_max:
            dragged = (0, *turns[:-1])
            found.append(tuple((-t - drag * d) % positions for t, d in zip(turns, dragged, strict=True)))
    return found
