"""Work on an event loop of its own, also inside a running loop: a plain one, and that of a real Jupyter kernel."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from tests.support.scripted_trees import mixed_reply, sampler
from treepo.engines.scripted import ScriptedEngine
from treepo.event_loop import EventLoop

ROOT = Path(__file__).parents[1]


async def where() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    await asyncio.sleep(0)
    return asyncio.get_running_loop(), threading.current_thread()


def test_all_work_is_done_on_one_loop_in_and_outside_of_a_running_one() -> None:
    with EventLoop() as loop:
        first, here = loop.run(where())
        assert here is threading.current_thread()

        async def cell() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
            return loop.run(where())  # what asyncio.run refuses

        second, there = asyncio.run(cell())
        assert there is not threading.current_thread()
        third, _ = loop.run(where())
        assert first is second is third
    assert first.is_closed()


def test_an_error_arrives_and_the_loop_can_be_closed_inside_a_running_one() -> None:
    async def fails() -> None:
        raise ValueError("mine")

    async def cell() -> None:
        with EventLoop() as loop, pytest.raises(ValueError, match="mine"):
            loop.run(fails())

    asyncio.run(cell())


def test_a_sampler_in_a_running_loop_grows_the_same_trees() -> None:
    prompts = [("a", [2, 3]), ("b", [2])]
    expected = sampler(ScriptedEngine(mixed_reply)).sample(prompts, seed=1)

    async def cell() -> Any:
        return sampler(ScriptedEngine(mixed_reply)).sample(prompts, seed=1)

    assert asyncio.run(cell()) == expected


def test_ctrl_c_in_a_running_loop_cancels_the_work() -> None:
    program = """
        import asyncio, os, signal, threading
        from treepo.event_loop import EventLoop

        async def endless():
            os.kill(os.getpid(), signal.SIGINT)  # the main thread waits for this one
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                print("cancelled", flush=True)
                raise

        async def cell():
            with EventLoop() as loop:
                loop.run(endless())

        try:
            # As a notebook's kernel does it: asyncio.run would keep the first Ctrl-C for its own task.
            asyncio.new_event_loop().run_until_complete(cell())
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.stdout.split() == ["cancelled", "interrupted"], done.stderr


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    manager = KernelManager()
    manager.start_kernel(env={**os.environ, "PYTHONPATH": str(ROOT), "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run_cell(kernel: Any, code: str) -> str:
    """What a cell prints; an error in it fails the test."""
    request, printed = kernel.execute(code), ""
    while True:
        try:
            message = kernel.get_iopub_msg(timeout=240)
        except Empty:
            pytest.fail("the kernel says nothing more")
        if message["parent_header"].get("msg_id") != request:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "stream" and content["name"] == "stdout":
            printed += content["text"]
        elif kind == "error":
            pytest.fail("\n".join(content["traceback"]))
        elif kind == "status" and content["execution_state"] == "idle":
            return printed


def test_a_kernel_runs_cells_inside_a_running_loop(kernel: Any) -> None:
    assert "True" in run_cell(kernel, "import asyncio; print(asyncio.get_running_loop().is_running())")


def test_the_cell_of_the_readme_runs_in_a_kernel(kernel: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert re.search(r"8 leaves, \d+ tokens generated for \d+", run_cell(kernel, code))


def test_a_run_trains_in_a_kernel(kernel: Any, tmp_path: Path) -> None:
    code = f"""
        from treepo import training
        from tests.support.small_runs import small_config
        from pathlib import Path

        with training(small_config(Path({str(tmp_path)!r}), "trainer.steps=1", "warmup.steps=2")) as trainer:
            trainer.run()
        print(trainer.state.step)
    """
    assert run_cell(kernel, textwrap.dedent(code)).split()[-1] == "1"
