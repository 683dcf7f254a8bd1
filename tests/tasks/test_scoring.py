import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from treepo.errors import TaskError
from treepo.settings import Settings
from treepo.tasks import Problem
from treepo.tasks.dataset import DatasetTask
from treepo.tasks.program import ProgramTask
from treepo.tasks.scoring import Score, Scorer, ScoringSettings

PROBLEM = Problem("1", "Why?", "42")
USERS_CODE = """
    import os, signal, subprocess, sys, time

    held = []

    def reward(prompt, response, answer):
        if response == "raise":
            raise ValueError("first\\n  second")
        if response == "hang":
            while True:
                pass
        if response == "hang with a child":
            child = subprocess.Popen(["sleep", "600"])
            open("child", "w").write(str(child.pid))
            time.sleep(600)
        if response == "print":
            print("to stdout")
            os.write(1, b"to fd 1\\n")
            subprocess.run(["echo", "from a child"])
        if response == "read":
            return len(sys.stdin.read())
        if response == "exit":
            sys.exit(3)
        if response == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if response == "leak":
            while True:
                held.append(bytes(2**28))
        if response == "which process":
            return os.getpid()
        if response == "sleep":
            time.sleep(0.4)
        if response == "sleep and tell":
            time.sleep(0.4)
            return os.getpid()
        return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None}.get(response, len(response))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with the user's module."""
    (tmp_path / "users_code.py").write_text(textwrap.dedent(USERS_CODE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TASK = DatasetTask(path="d.jsonl", reward="users_code:reward")
BOUNDS = ScoringSettings(timeout_s=0.5, workers=1, memory_gib=0.5)


def ask(scorer, *responses):
    return scorer.score([(PROBLEM, response) for response in responses])


def test_each_misbehaviour_costs_its_own_leaf_only(here, capfd):
    expected = {
        "raise": Score(None, "reward raised ValueError: first second"),
        "nan": Score(None, "reward is nan"),
        "inf": Score(None, "reward is inf"),
        "text": Score(None, "reward is '1.0', not a number"),
        "none": Score(None, "reward is None, not a number"),
        "print": Score(5.0),
        "read": Score(0.0),
        "exit": Score(None, "reward process exited with status 3"),
        "crash": Score(None, "reward process was killed by SIGSEGV"),
        "hang": Score(None, "reward timed out after 1 s"),
        "leak": Score(None, "reward exceeded 0.5 GiB of memory"),
        "fine": Score(4.0),
    }
    with Scorer(TASK, BOUNDS.model_copy(update={"timeout_s": 1.0})) as scorer:
        assert dict(zip(expected, ask(scorer, *expected), strict=True)) == expected
    out, err = capfd.readouterr()
    assert out == ""
    for said in ("to stdout", "to fd 1", "from a child"):
        assert said in err


def test_scores_come_in_order_from_several_processes_side_by_side(here):
    with Scorer(TASK, ScoringSettings(timeout_s=30, workers=2)) as scorer:
        responses = ["sleep", "a", "bb", "ccc", "sleep", "dddd", "hang-not"] * 3
        assert [score.reward for score in ask(scorer, *responses)] == [float(len(r)) for r in responses]
        first, second = ask(scorer, "sleep and tell", "sleep and tell")
        assert first.reward != second.reward
    with pytest.raises(RuntimeError):
        ask(scorer, "a")


def test_a_timeout_kills_the_children_of_the_reward_too(here):
    with Scorer(TASK, BOUNDS) as scorer:
        assert ask(scorer, "hang with a child")[0].reason == "reward timed out after 0.5 s"
    assert gone(int((here / "child").read_text()))


def test_closing_leaves_no_process(here):
    with Scorer(TASK, BOUNDS.model_copy(update={"workers": 2})) as scorer:
        processes = {int(ask(scorer, "which process")[0].reward) for _ in range(4)}
    assert processes and all(gone(process) for process in processes)


@pytest.mark.parametrize("busy", [False, True])
def test_workers_die_with_a_parent_that_is_killed(here, busy):
    code = f"""
        from treepo.tasks.scoring import *
        from treepo.tasks.dataset import *
        task = DatasetTask(path="d.jsonl", reward="users_code:reward")
        scorer = Scorer(task, ScoringSettings(timeout_s=100, workers=1))
        ask = lambda response: scorer.score([(Problem("1", "", ""), response)])[0].reward
        print(int(ask("which process")), flush=True)
        ask("hang" if {busy} else "a")
        print(flush=True)
        input()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        worker = int(parent.stdout.readline())
        if busy:
            time.sleep(0.2)
        else:
            parent.stdout.readline()
        assert not gone(worker, within_s=0)
        parent.send_signal(signal.SIGKILL)
    assert gone(worker)


def gone(process, within_s=10.0):
    """Whether the process ends in time (a zombie that init has not collected yet has ended)."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def test_no_file_in_the_current_directory_hides_a_module_of_ours(here):
    (here / "queue.py").write_text("1 / 0")
    (here / "json.py").write_text("1 / 0")
    with Scorer(TASK, BOUNDS) as scorer:
        assert ask(scorer, "a") == [Score(1.0)]


def test_the_start_of_a_worker_is_no_leafs_time(tmp_path, monkeypatch):
    (tmp_path / "slow_code.py").write_text(
        "import time\ntime.sleep(1.5)\nreward = lambda prompt, response, answer: 1\n"
    )
    monkeypatch.chdir(tmp_path)
    with Scorer(DatasetTask(path="d.jsonl", reward="slow_code:reward"), BOUNDS) as scorer:
        assert ask(scorer, "a") == [Score(1.0)]


@pytest.mark.parametrize(
    ("code", "spec", "message"),
    [
        (None, "absent_module:reward", "cannot import 'absent_module': ModuleNotFoundError: No module named"),
        ("1 / 0", "broken_a:reward", "cannot import 'broken_a': ZeroDivisionError: division by zero"),
        ("def rewards(): ...", "broken_b:reward", "'reward' in 'broken_b' does not exist; did you mean 'rewards'"),
        ("reward = 3", "broken_c:reward", "'reward' in 'broken_c' is not callable"),
        ("import sys; sys.exit(4)", "broken_d:reward", "a reward worker could not start: it exited with status 4"),
    ],
)
def test_a_worker_that_cannot_start_is_reported_at_once(tmp_path, monkeypatch, code, spec, message):
    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / f"{spec.partition(':')[0]}.py").write_text(code)
    with pytest.raises(TaskError, match=message) as caught:
        Scorer(DatasetTask(path="d.jsonl", reward=spec), BOUNDS)
    assert "\n" not in str(caught.value)


class Scripted(Settings):
    """A task of a user's own; `isolated` or not."""

    isolated: bool = False

    def reward(self, problem, response):
        if response == "raise":
            raise KeyError("no such thing")
        return {"nan": float("nan"), "none": None, "true": True}.get(response, 0.5)


def test_a_harmless_task_is_asked_in_this_process():
    with Scorer(Scripted(), BOUNDS) as scorer:
        assert ask(scorer, "raise", "nan", "none", "true", "else") == [
            Score(None, "reward raised KeyError: 'no such thing'"),
            Score(None, "reward is nan"),
            Score(None, "reward is None, not a number"),
            Score(1.0),
            Score(0.5),
        ]
    problem = ProgramTask().problems("test")[0]
    with Scorer(ProgramTask(), ScoringSettings()) as scorer:
        assert scorer.score([(problem, f"\\boxed{{{problem.answer}}}"), (problem, "")]) == [Score(1.0), Score(0.0)]
        assert scorer.score([]) == []


def test_a_users_task_is_rebuilt_in_the_worker_and_a_local_class_is_refused():
    with Scorer(Scripted(isolated=True), BOUNDS) as scorer:
        assert ask(scorer, "else") == [Score(0.5)]

    class Local(Scripted):
        pass

    with pytest.raises(TaskError, match="must be able to build it: make it a Settings class at the top level"):
        Scorer(Local(isolated=True), BOUNDS)


def test_boxed_answers_are_judged_in_bounded_time():
    task = DatasetTask(path="d.jsonl")
    half = Problem("1", "?", "1/2")
    monster = r"\boxed{9^{9^{9^{9^9}}}}"
    with Scorer(task, ScoringSettings(timeout_s=3, workers=1)) as scorer:
        scores = scorer.score([(half, r"\boxed{0.5}"), (half, r"\boxed{\frac12}"), (half, "0.5"), (half, monster)])
    assert scores == [Score(1.0), Score(1.0), Score(0.0), Score(None, "reward timed out after 3 s")]


def test_responses_may_be_long_and_hold_any_character(here):
    with Scorer(TASK, BOUNDS.model_copy(update={"timeout_s": 10.0})) as scorer:
        responses = ["x" * 3_000_000, "ü\n\x00\u2028", "\ud800"]
        assert [score.reward for score in ask(scorer, *responses)] == [3_000_000.0, 4.0, 1.0]


def test_bounds_must_be_positive():
    for fields in ({"timeout_s": 0}, {"workers": 0}, {"memory_gib": 0}):
        with pytest.raises(ValidationError):
            ScoringSettings(**fields)


# In an event loop ----------------------------------------------------------------------------------------------------


def test_what_nobody_waits_for_any_more_is_not_begun(here):
    async def give_up(scorer):
        waiting = asyncio.ensure_future(scorer.score_async([(PROBLEM, "sleep and tell")] * 3 + [(PROBLEM, "crash")]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with Scorer(TASK, BOUNDS.model_copy(update={"timeout_s": 10.0})) as scorer:
        (before,) = ask(scorer, "which process")
        asyncio.run(give_up(scorer))
        assert ask(scorer, "which process") == [before], "the crash was never asked for"


def test_after_an_error_of_the_task_the_other_leaves_are_given_up(here):
    async def lose(scorer):
        await scorer.score_async([(PROBLEM, response) for response in ("exit", "a", "b", "c", "d")])

    with Scorer(TASK, BOUNDS) as scorer:
        (here / "users_code.py").write_text("1 / 0")
        with pytest.raises(TaskError, match="cannot import 'users_code'"):
            asyncio.run(lose(scorer))
        (here / "users_code.py").write_text(
            "def reward(prompt, response, answer): return open(response, 'w').write('!')"
        )
        assert ask(scorer, "mended") == [Score(1.0)] and (here / "mended").exists()
        assert not (here / "d").exists()


def test_a_harmless_task_is_asked_without_giving_way_to_the_event_loop():
    with Scorer(Scripted(), BOUNDS) as scorer, pytest.raises(StopIteration) as done:
        scorer.score_async([(PROBLEM, "else"), (PROBLEM, "none")]).send(None)
    assert done.value.value == [Score(0.5), Score(None, "reward is None, not a number")]
