"""A real vLLM server, on a CPU. Needs the environment that `make venv-vllm` makes; `make test-vllm` runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
import torch
from servers import engine_of
from small_runs import character_tokenizer
from test_lora import stir
from test_server_engine import grow, run, shaken, worst_error
from transformers import LlamaConfig, LlamaForCausalLM

from treepo import lora
from treepo import model as causal_lm
from treepo.engines import Sampling
from treepo.engines.server import ServerEngine
from treepo.errors import EngineError
from treepo.lora import LoraSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM: `make test-vllm`"),
    pytest.mark.filterwarnings("default"),  # its imports warn
]
FLAGS = (
    "--dtype",
    "float32",
    "--enforce-eager",
    "--no-enable-chunked-prefill",
    "--max-num-batched-tokens",
    "2048",
    "--max-model-len",
    "256",
    "--block-size",
    "32",
    "--max-num-seqs",
    "64",
)
RIGHT = ("--logprobs-mode", "processed_logprobs", "--enable-scale-out")
ADAPTERS = ("--enable-lora", "--max-lora-rank", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads that vLLM takes."""
    special = {"eos_token": "<eos>"}
    found, tokenizer = tmp_path_factory.mktemp("model"), character_tokenizer(**special)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        head_dim=64,
        intermediate_size=256,
        max_position_embeddings=256,
        initializer_range=0.1,
        **shape,
        **ids,
    )
    LlamaForCausalLM(config).save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


def serving(folder: Path, *flags: str) -> Iterator[str]:
    """The address of a server with `flags`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    more["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            folder,
            "--port",
            str(port),
            *FLAGS,
            *flags,
        ],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 280
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # a vLLM that hangs on its way out is not our subject
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    yield from serving(folder, *RIGHT)


@pytest.mark.parametrize(("dialect", "expected"), [("auto", "vllm"), ("completions", "completions")])
def test_vllm_samples_what_the_model_would(url: str, folder: Path, tmp_path: Path, dialect: str, expected: str) -> None:
    policy = causal_lm.load(str(folder))
    sampling = Sampling(temperature=0.7)
    engine = engine_of(policy, tmp_path, url, dialect=dialect, timeout_s=200)
    once, again = run(engine, grow(engine, sampling=sampling), grow(engine, sampling=sampling))
    assert engine._replicas[0].dialect is not None and engine._replicas[0].dialect.name == expected
    assert max(worst_error(policy, tree, 0.7) for tree in once) < 1e-4
    assert [[n.tokens for n in tree.nodes] for tree in once] == [[n.tokens for n in tree.nodes] for tree in again]


def test_vllm_loads_new_weights(url: str, folder: Path, tmp_path: Path) -> None:
    policy = causal_lm.load(str(folder))
    engine = engine_of(policy, tmp_path, url, timeout_s=200)

    async def steps() -> None:
        for version in (1, 2):
            shaken(policy)
            await engine.load_weights(version)
            assert max(worst_error(policy, tree) for tree in await grow(engine)()) < 1e-4
        policy.load_state_dict(causal_lm.load(str(folder)).state_dict())
        await engine.load_weights(3)

    run(engine, steps)


def test_vllm_that_sends_log_probs_before_temperature_is_told_how_to_be_started(folder: Path, tmp_path: Path) -> None:
    for url in serving(folder):
        engine = engine_of(causal_lm.load(str(folder)), tmp_path, url, timeout_s=200)
        with pytest.raises(EngineError, match="start vLLM with --logprobs-mode processed_logprobs"):
            run(engine, grow(engine))


def test_vllm_loads_adapters(folder: Path, tmp_path: Path) -> None:
    policy = causal_lm.load(str(folder))
    lora.attach(policy, LoraSettings(rank=8), str(folder), seed=0)
    for url in serving(folder, *RIGHT, *ADAPTERS):
        for dialect in ("vllm", "completions"):
            engine = engine_of(policy, tmp_path, url, dialect=dialect, timeout_s=200)

            async def steps(engine: ServerEngine = engine) -> None:
                for version in (1, 2):
                    before = await grow(engine)()
                    stir(policy, seed=version)
                    assert max(worst_error(policy, tree) for tree in before) > 0.05
                    await engine.load_weights(version)
                    assert max(worst_error(policy, tree) for tree in await grow(engine)()) < 1e-4

            run(engine, steps)


def test_vllm_without_lora_is_told_how_to_be_started(url: str, folder: Path, tmp_path: Path) -> None:
    policy = causal_lm.load(str(folder))
    lora.attach(policy, LoraSettings(rank=8), str(folder), seed=0)
    engine = engine_of(policy, tmp_path, url, timeout_s=200)
    with pytest.raises(EngineError, match=r"LoRA is not enabled.*start vLLM with --enable-lora"):
        run(engine, lambda: engine.load_weights(1))
