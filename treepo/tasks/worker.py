"""The process that computes rewards for `treepo.tasks.scoring`: JSON lines in on stdin, out on stdout.

First line in: the task's class and settings, the bounds. Out: `{}`, or `{"error": ...}` if the task cannot be built.
Then for each `{"problem": ..., "response": ...}` one `{"reward": ..., "reason": ..., "last": ...}`; after a last one
this process is not to be used again.
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

GRACE_S = 5.0  # by then our parent has killed us, if it lives


def main() -> None:
    """Serve until stdin ends."""
    requests, replies = _claim_pipes()
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    hello = inbox.get()
    try:
        task = _build(hello)
    except Exception as error:  # noqa: BLE001  # it may be the user's code; our parent raises it
        _reply(replies, {"error": " ".join(f"{_prefix(error)}{error}".split())})
        return
    _reply(replies, {})
    while True:
        request = inbox.get()
        # Should our parent die while C code hangs here, `_listen` may never run: then the kernel's timer ends us.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, hello["timeout_s"] + GRACE_S)
        try:
            score = judge(task, Problem(**request["problem"]), request["response"])
            reply = {"reward": score.reward, "reason": score.reason, "last": False}
        except MemoryError:
            # What filled the memory may still be held, so the next leaf gets a new process.
            reply = {"reward": None, "reason": f"reward exceeded {hello['memory_gib']} GiB of memory", "last": True}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply)


def _claim_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Our ends of the protocol; from now on the user's code reads nothing from stdin and prints to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # for C code and child processes
    sys.stdout = sys.stderr  # for Python, without a buffer that our end would lose
    return requests, replies


def _listen(requests: IO[bytes], inbox: SimpleQueue[dict[str, Any]]) -> None:
    """Take requests in, also while a reward is computed: their end means that our parent is gone, and so are we."""
    for line in requests:
        inbox.put(json.loads(line))
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _build(hello: dict[str, Any]) -> Task:
    """The task of the parent, within its memory."""
    if hello["memory_gib"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = int(hello["memory_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    kind = attrgetter(hello["name"])(importlib.import_module(hello["module"]))
    task: Task = kind.model_validate(hello["settings"])
    prepare = getattr(task, "prepare", None)  # optional: loads what the reward needs, before any leaf waits for it
    if prepare is not None:
        prepare()
    return task


def _prefix(error: Exception) -> str:
    return "" if isinstance(error, TreePOError) else f"task: a reward worker could not start: {type(error).__name__}: "


def _reply(replies: IO[bytes], value: dict[str, Any]) -> None:
    replies.write(json.dumps(value).encode() + b"\n")
