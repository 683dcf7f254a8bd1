from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from treepo.tasks import Problem, Teacher
from treepo.tasks.lock import CHARACTERS, LockTask

TASK = LockTask()
PLAIN = LockTask(dials=2, gear=1, shortest_min=2, shortest_max=4, moves=6, train_problems=10, test_problems=10, habit=0)
SHAPES = [
    (1, 3, 1, 1),
    (2, 7, 3, 0),
    (3, 5, 2, 2),
    (3, 8, 3, 1),
    (3, 8, 1, 1),
    (4, 4, 3, 1),
]  # dials, positions, gear, drag


def every_lock(dials, positions, gear, drag, **more):
    """A task of all locks of a shape, half of them for training."""
    longest = dials * (positions // 2)
    size = positions**dials - 1
    return LockTask(
        dials=dials,
        positions=positions,
        gear=gear,
        drag=drag,
        shortest_min=1,
        shortest_max=longest,
        moves=longest,
        train_problems=size - size // 2,
        test_problems=size // 2,
        **more,
    )


def fewest_moves(task):
    """Lock -> fewest moves that open it, by breadth-first search."""
    found = {(0,) * task.dials: 0}
    todo = deque(found)
    while todo:
        lock = todo.popleft()
        for dial in range(task.dials):
            for by in (1, -1):
                after = task.turn(lock, (dial, by))
                if after not in found:
                    found[after] = found[lock] + 1
                    todo.append(after)
    return found


def test_a_move_turns_a_dial_by_its_gear_and_drags_the_next_by_one():
    assert TASK.gears == (1, 3, 9, 7)
    assert TASK.turn((3, 9, 0, 5), (0, 1)) == (4, 0, 0, 5)
    assert TASK.turn((3, 9, 0, 5), (1, -1)) == (3, 6, 9, 5)
    assert TASK.turn((3, 9, 0, 5), (3, 1)) == (3, 9, 0, 2)
    assert LockTask(drag=3).turn((0, 0, 0, 0), (0, -1)) == (9, 7, 0, 0)
    assert LockTask(drag=0).turn((0, 0, 0, 0), (0, -1)) == (9, 0, 0, 0)
    assert LockTask(gear=1).turn((0, 0, 0, 0), (1, 1)) == (0, 1, 1, 0)
    assert LockTask(positions=8, train_problems=1000).turn((7, 7, 7, 7), (1, 1)) == (7, 2, 0, 7)


@pytest.mark.parametrize(
    ("response", "worth"),
    [
        ("a-00;", 1),  # 11 -> 00
        ("a-00;a-99;a+00;", 1),  # opened, closed and opened again
        ("b-10;a-09;b+00;", 1),  # the wrong dial first: it is dragged later and turned back
        ("a+22;a-11;a-00;", 1),  # the wrong way, and back
        ("b+12;b+13;a-02;b-01;b-00;", 1),  # a mistake made good late
        ("b+12;b+13;b+14;a-03;b-02;b-01;b-00;", 0),  # seven moves
        ("b+12;b+13;b-12;a-01;b-00;", 1),
        ("a+22;a-11;", 0),  # not open
        ("a-00;a-99;", 0),  # opened and closed again
        ("a-57;", 1),  # a wrong note, but the move is right
        ("a-10;b-00;", 0),  # a wrong note that misleads
        ("", 0),
        ("a-00", 0),
        ("a-00;a", 0),
        ("a-00; ", 0),
        ("a-00;\n", 0),
        ("a-0;", 0),
        ("a-000;", 0),
        ("c-00;", 0),  # no such dial
        ("a00;", 0),
        ("a-\u0660\u0660;", 0),  # digits, but not ours
    ],
)
def test_a_response_is_right_if_its_moves_open_the_lock_and_are_not_too_many(response, worth):
    assert PLAIN.reward(Problem("test-0", "11?", "a-"), response) == worth


def test_the_final_answer_is_the_moves():
    assert PLAIN.final_answer("b+12;b-11;a-00;") == "b+b-a-"
    assert PLAIN.final_answer("b+99;b-99;a-99;") == "b+b-a-"
    assert PLAIN.final_answer("a-00") is None


@pytest.mark.parametrize(("dials", "positions", "gear", "drag"), SHAPES)
def test_locks_are_those_of_the_wanted_distance_and_a_good_move_lessens_it(dials, positions, gear, drag):
    task = every_lock(dials, positions, gear, drag)
    fewest = fewest_moves(task)
    assert len(fewest) == positions**dials
    for low, high in ((1, 1), (2, 3), (1, task.moves)):
        some = task.model_copy(update={"shortest_min": low, "shortest_max": high})
        assert sorted(some.locks) == sorted(lock for lock, moves in fewest.items() if low <= moves <= high)
    for lock, moves in fewest.items():
        assert not moves or fewest[task.turn(lock, task.good_move(lock))] == moves - 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(SHAPES[1:]))
def test_splits_are_disjoint_and_together_all_locks_if_so_asked(seed, shape):
    task = every_lock(*shape, seed=seed)
    problems = [*task.problems("train"), *task.problems("test")]
    assert len({p.prompt for p in problems}) == len({p.id for p in problems}) == len(task.locks) == len(problems)


def test_the_seed_orders_the_locks_and_the_same_seed_alike():
    first = [p.prompt for p in TASK.problems("train")[:50]]
    assert first == [p.prompt for p in LockTask().problems("train")[:50]]
    assert first != [p.prompt for p in LockTask(seed=1).problems("train")[:50]]


def test_problems_carry_a_shortest_answer_that_is_right():
    fewest = fewest_moves(TASK)
    for problem in TASK.problems("test")[:100]:
        lock = tuple(map(int, problem.prompt[:-1]))
        assert len(problem.answer) == 2 * fewest[lock]
        moves = [problem.answer[i : i + 2] for i in range(0, len(problem.answer), 2)]
        assert TASK.reward(problem, "".join(f"{move}0000;" for move in moves)) == 1.0


def notes(task, problem, response):
    """(lock, dial, by, noted lock) of each line."""
    lock, found = tuple(map(int, problem.prompt[:-1])), []
    for line in response.split(";")[:-1]:
        dial, by = "abcde".index(line[0]), {"+": 1, "-": -1}[line[1]]
        found.append((lock, dial, by, tuple(map(int, line[2:]))))
        lock = task.turn(lock, (dial, by))
    return found


@given(st.integers(0, 2**31), st.integers(0, 10**5))
def test_the_teacher_keeps_to_the_form_notes_truly_and_opens_every_lock(seed, index):
    problem, response = TASK.lesson(seed, index)
    assert TASK.final_answer(response) is not None
    lines = notes(TASK, problem, response)
    assert all(noted == TASK.turn(lock, (dial, by)) for lock, dial, by, noted in lines)
    assert not any(lines[-1][-1]) and all(any(noted) for *_, noted in lines[:-1])
    assert TASK.reward(problem, response) == (len(lines) <= TASK.moves)
    assert len(lines) <= TASK.moves + TASK.dials * TASK.positions // 2
    tokens = TASK.tokenizer().encode(problem.prompt + response)
    assert len(tokens) == len(problem.prompt + response)


def test_a_teacher_without_habits_opens_every_lock_the_shortest_way():
    task = LockTask(habit=0)
    lessons = [task.lesson(0, index) for index in range(50)]
    assert all(task.final_answer(response) == problem.answer for problem, response in lessons)


def test_a_slip_turns_the_dial_the_wrong_way_as_often_as_the_habit_says():
    task = LockTask(habit=0.8)
    turned: dict[tuple[int, int], list[bool]] = {}
    for index in range(1500):
        for lock, dial, by, _ in notes(task, *task.lesson(1, index))[: task.moves]:
            good = task.good_move(lock)
            assert dial == good[0]
            turned.setdefault((dial, lock[dial]), []).append(by != good[1])
    frequent = {place: sum(wrong) / len(wrong) for place, wrong in turned.items() if len(wrong) > 300}
    assert len(frequent) > 20
    assert all(abs(share - task.chance_of_slip(*place)) < 0.1 for place, share in frequent.items())
    assert min(frequent.values()) < 0.1 and 0.6 < max(frequent.values()) < 0.85


def test_every_setting_of_the_difficulty_makes_a_difference():
    def right(**settings):
        task = LockTask(**settings)
        return sum(task.reward(*task.lesson(0, index)) for index in range(300)) / 300

    usual = right()
    assert 0.1 < usual < 0.5
    assert right(habit=0) == 1.0 and right(habit=0.5) > usual + 0.1
    assert right(moves=10) < usual - 0.05
    assert right(shortest_min=3, shortest_max=6, train_problems=500) > usual + 0.1
    assert LockTask(dials=5).problems("test")[0].prompt.strip("?").isdecimal()
    assert len(LockTask(dials=5).problems("test")[0].prompt) == 6
    fewer = LockTask(positions=8, train_problems=1000).problems("test")
    assert {*"".join(p.prompt for p in fewer)} == {*"01234567?"}


def test_lessons_are_a_function_of_seed_and_index_and_never_of_test_problems():
    task = every_lock(3, 5, 2, 1)
    assert task.lesson(3, 5) == task.lesson(3, 5) != task.lesson(4, 5)
    held_out = {problem.prompt for problem in task.problems("test")}
    assert not any(task.lesson(0, i)[0].prompt in held_out for i in range(500))


def test_lock_settings_that_cannot_be_met_are_refused():
    with pytest.raises(ValidationError, match="only 8 such locks exist, but test_problems"):
        LockTask(dials=2, shortest_min=2, shortest_max=2)
    with pytest.raises(ValidationError, match="shortest_min 9 is above shortest_max 7"):
        LockTask(shortest_min=9, shortest_max=7)
    with pytest.raises(ValidationError, match="gear 3 and positions 9 have a common divisor"):
        LockTask(positions=9)
    with pytest.raises(ValidationError, match="shortest_max 9 moves cannot be opened in 8"):
        LockTask(shortest_max=9, moves=8)


def test_a_lock_task_is_a_teacher_with_a_token_for_every_character():
    tokenizer = TASK.tokenizer()
    assert isinstance(TASK, Teacher)
    assert tokenizer.decode(tokenizer.encode(CHARACTERS)) == CHARACTERS
    assert len(tokenizer) == 2 + len(CHARACTERS)
