"""The process that computes rewards for `treepo.tasks.scoring`. It reads JSON lines on stdin and writes them on stdout.

The first request has the task's class, settings and limits. The reply is `{}`, or `{"error": ...}` if the task cannot
be built. Every further request is `{"problem": ..., "response": ...}`, and its reply `{"reward": ..., "reason": ...,
"last": ...}`. If `last` is true, this process must not be used again.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from operator import attrgetter
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from treepo.errors import TreePOError
from treepo.tasks import Problem, Task
from treepo.tasks.scoring import judge

GRACE_S = 5.0  # a living parent kills this process before this time is over


def main() -> None:
    """Answer requests until stdin ends."""
    requests, replies = _claim_pipes()
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    hello = inbox.get()
    try:
        task = _build(hello)
    except Exception as error:  # noqa: BLE001  # it may be the user's code; the parent process raises it
        _reply(replies, {"error": " ".join(f"{_prefix(error)}{error}".split())})
        return
    _reply(replies, {})
    while True:
        request = inbox.get()
        # If the parent dies while C code hangs here, `_listen` may never run. Then the timer ends this process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, hello["timeout_s"] + GRACE_S)
        try:
            score = judge(task, Problem(**request["problem"]), request["response"])
            reply = {"reward": score.reward, "reason": score.reason, "last": False}
        except MemoryError:
            # The memory may still be full, so the next leaf gets a new process.
            reply = {"reward": None, "reason": f"reward exceeded {hello['memory_gib']} GiB of memory", "last": True}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply)


def _claim_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes for requests and replies. After this, the user's code gets an empty stdin and prints to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # for C code and child processes
    sys.stdout = sys.stderr  # for Python; stderr has no buffer that could be lost when this process is killed
    return requests, replies


def _listen(requests: IO[bytes], inbox: SimpleQueue[dict[str, Any]]) -> None:
    """Read requests. When stdin ends, the parent has ended: end this process too."""
    for line in requests:
        inbox.put(json.loads(line))
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _build(hello: dict[str, Any]) -> Task:
    """Set the memory limit and build the task."""
    if hello["memory_gib"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = int(hello["memory_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    kind = attrgetter(hello["name"])(importlib.import_module(hello["module"]))
    task: Task = kind.model_validate(hello["settings"])
    prepare = getattr(task, "prepare", None)  # optional: loads what the reward needs, before the first leaf
    if prepare is not None:
        prepare()
    return task


def _prefix(error: Exception) -> str:
    return "" if isinstance(error, TreePOError) else f"task: a reward worker could not start: {type(error).__name__}: "


def _reply(replies: IO[bytes], value: dict[str, Any]) -> None:
    replies.write(json.dumps(value).encode() + b"\n")
