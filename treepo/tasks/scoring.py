"""Rewards of responses. If a reward raises, hangs or crashes, its leaf has no reward, and the run continues.

If `task.isolated` is false, rewards are computed in this process. Otherwise worker processes (`treepo.tasks.worker`)
compute them. A worker gets one leaf at a time, as a line of JSON. After the time limit, it is killed with all its
children, and a new one is started. A thread waits for each worker, so the event loop is not blocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, SupportsFloat

from pydantic import BaseModel, Field

from treepo.errors import TaskError
from treepo.settings import Settings
from treepo.tasks import Problem, Task

START_S = 120.0  # for the import of sympy or of the user's module; far more than that needs on a busy machine
# The worker gets the import path of this process, so a file in the current directory cannot hide a module.
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from treepo.tasks.worker import main; main()"
LONGEST_REASON = 300  # characters


class ScoringSettings(Settings):
    """Limits for rewards that may hang or crash. The tasks `program` and `lock` do not need them."""

    timeout_s: float = Field(
        5.0, gt=0, description="Most seconds for the reward of one response; after that, it is unknown."
    )
    workers: int = Field(2, ge=1, description="Processes that compute rewards in parallel.")
    memory_gib: float | None = Field(
        4.0, gt=0, description="Most GiB of address space of a worker (RLIMIT_AS); null: no limit."
    )


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of a leaf, or the reason why it is not known."""

    reward: float | None
    reason: str = ""  # one line; "" if the reward is known


def judge(task: Task, problem: Problem, response: str) -> Score:
    """Compute the reward in this process. Raises only `MemoryError`, for the code that limits the memory."""
    try:
        value: object = task.reward(problem, response)
        if not isinstance(value, SupportsFloat):
            return Score(None, f"reward is {_line(repr(value))}, not a number")
        reward = float(value)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # the user's code may raise anything; the score has the reason
        return Score(None, f"reward raised {type(error).__name__}: {_line(str(error))}".rstrip(": "))
    if not math.isfinite(reward):
        return Score(None, f"reward is {reward}")
    return Score(reward)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."


class Scorer:
    """Scores leaves. A context manager: `close` ends the workers. They also end when this process ends.

    All workers are started here. If a worker cannot build the task, for example because it cannot import the reward
    function, this raises `TaskError`. The time limit of a leaf does not include the start of its worker.
    """

    def __init__(self, task: Task, settings: ScoringSettings) -> None:
        self._task = task
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None
        if not task.isolated:
            return
        hello = _hello(task, settings)
        self._workers = [_Worker(hello, settings) for _ in range(settings.workers)]
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="score")
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                worker.wait_until_ready()
                self._idle.put(worker)
        except BaseException:  # clean up, then raise it again
            self.close()
            raise

    def score(self, items: Sequence[tuple[Problem, str]]) -> list[Score]:
        """The scores of (problem, response) pairs, in order. Can be called from several threads."""
        if self._pool is None:
            return [judge(self._task, problem, response) for problem, response in items]
        return list(self._pool.map(self._ask, items))

    async def score_async(self, items: Sequence[tuple[Problem, str]]) -> list[Score]:
        """As `score`, but does not block the event loop while workers are busy. Items start in the order of the calls.

        Without workers, the scores are computed at once. After a cancellation, items that no worker has started are
        dropped.
        """
        if self._pool is None:
            return self.score(items)
        scores = [asyncio.wrap_future(self._pool.submit(self._ask, item)) for item in items]
        try:
            return await asyncio.gather(*scores)
        finally:
            for score in scores:
                score.cancel()

    def _ask(self, item: tuple[Problem, str]) -> Score:
        worker = self._idle.get()
        try:
            return worker.ask(*item)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers. Leaves that are being scored get no reward."""
        for worker in self._workers:
            worker.retire()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hello(task: Task, settings: ScoringSettings) -> bytes:
    """A line of JSON with everything that a worker needs to build the task: its class, settings and limits."""
    kind = type(task)
    if not isinstance(task, BaseModel) or kind.__module__ == "__main__" or "<" in kind.__qualname__:
        raise TaskError(
            f"task: {kind.__qualname__} is isolated, so worker processes must be able to build it: make it a Settings "
            "class at the top level of a module that can be imported"
        )
    value = {
        "module": kind.__module__,
        "name": kind.__qualname__,
        "settings": task.model_dump(mode="json", by_alias=True),
        **settings.model_dump(include={"timeout_s", "memory_gib"}),
    }
    return json.dumps(value).encode() + b"\n"


class _Worker:
    """Holds one worker process at a time. One thread uses it at a time; only `retire` may come from another one."""

    def __init__(self, hello: bytes, settings: ScoringSettings) -> None:
        self._hello, self._timeout_s = hello, settings.timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._retired = False

    def start(self) -> None:
        """Start a process, without waiting until it is ready."""
        if self._retired:
            raise RuntimeError("the scorer is closed")
        self._unread = b""
        self._process = subprocess.Popen(  # noqa: S603  # our own program and arguments
            [sys.executable, "-P", "-c", START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a new process group, which we can kill as a whole; Ctrl-C does not reach it
            # One thread per worker is enough. Also, BLAS reserves memory per thread, which counts in memory_gib.
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        with contextlib.suppress(BrokenPipeError):  # it has ended already: `wait_until_ready` reports that
            self._send(self._hello)

    def wait_until_ready(self) -> None:
        """Wait for the process. Raises `TaskError` if it cannot build the task."""
        try:
            reply = self._receive(START_S)
        except EOFError:
            raise TaskError(
                f"task: a reward worker could not start: it {self._bury()}; see its messages above"
            ) from None
        if reply is None:
            self.kill()
            raise TaskError(f"task: a reward worker was not ready after {START_S:g} s")
        if "error" in reply:
            self.kill()
            raise TaskError(reply["error"])

    def ask(self, problem: Problem, response: str) -> Score:
        """The score of one leaf. If the process fails, the score has the reason."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self.start()
            self.wait_until_ready()
        try:
            self._send(json.dumps({"problem": asdict(problem), "response": response}).encode() + b"\n")
            reply = self._receive(self._timeout_s)
        except (EOFError, BrokenPipeError):
            return Score(None, f"reward process {self._bury()}")
        if reply is None:
            self.kill()
            return Score(None, f"reward timed out after {self._timeout_s:g} s")
        if reply["last"]:
            self.kill()
        return Score(reply["reward"], reply["reason"])

    def retire(self) -> None:
        """End the process and never start another one. A thread that waits for the process then sees its end."""
        self._retired = True
        self._signal()

    def kill(self) -> None:
        """End the process and all processes that it started."""
        process = self._process
        if process is None:
            return
        self._signal()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None

    def _signal(self) -> None:
        # The group exists as long as one member lives. Its id is not used again before we have waited for the leader.
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended already
                os.killpg(self._process.pid, signal.SIGKILL)

    def _bury(self) -> str:
        """How the process ended, after it has closed its pipe. Ends its remaining children."""
        process = self._process
        if process is None:
            return "has ended"
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed the pipe but still runs: it is killed
            process.wait(1)
        status = process.returncode
        if status is not None:
            # `wait` has freed the process id, but remaining children keep the group and its id.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        self.kill()
        if status is None:
            return "closed its pipe"
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"

    def _send(self, line: bytes) -> None:
        if self._process is None or self._process.stdin is None:
            raise BrokenPipeError
        self._process.stdin.write(line)

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line of the process, or None after `timeout_s`. Raises `EOFError` if the process has ended."""
        if self._process is None or self._process.stdout is None:
            raise EOFError
        pipe = self._process.stdout
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                if not (read := pipe.read(1 << 16)):
                    raise EOFError
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply
