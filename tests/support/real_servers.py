"""Servers of vLLM and SGLang in processes of their own, and a model that both can serve on a CPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

from tests.support.small_runs import save_model


def save_servable(folder: Path) -> Path:
    """A model with random weights and heads of 64, and a tokenizer."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "head_dim": 64, "intermediate_size": 256}
    return save_model(folder, context=256, initializer_range=0.1, **sizes)


@contextmanager
def running(command: Sequence[str | Path], environment: Mapping[str, str]) -> Iterator[str]:
    """Start a server by `command` and a port, with `environment` added to ours; gives its address once it is well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 280
        while not _well(url):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode} before it served"
            assert time.monotonic() < deadline, "the server does not become well"
            time.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it hangs on its way out, which is no failure of ours
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _well(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False
