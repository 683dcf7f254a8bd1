"""A real vLLM server, on a CPU. Needs the environment that `make venv-vllm` makes; `make test-vllm` runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.adapters import stir
from tests.support.engine_trees import follows_updates, grow, run, shaken, worst_error
from tests.support.real_servers import running, save_servable
from tests.support.servers import engine_of
from treepo.engines import Sampling
from treepo.errors import EngineError
from treepo.models import causal_lm, lora
from treepo.models.lora import LoraSettings

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
    return save_servable(tmp_path_factory.mktemp("model"))


def serving(folder: Path, *flags: str) -> AbstractContextManager[str]:
    """The address of a server with `flags`."""
    more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    more["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    return running([*server, *FLAGS, *flags], more)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder, *RIGHT) as url:
        yield url


@pytest.mark.parametrize(("dialect", "expected"), [("auto", "vllm"), ("completions", "completions")])
def test_vllm_samples_what_the_model_would(url: str, folder: Path, tmp_path: Path, dialect: str, expected: str) -> None:
    policy = causal_lm.load(str(folder))
    sampling = Sampling(temperature=0.7)
    engine = engine_of(policy, tmp_path, url, dialect=dialect, timeout_s=200)
    once, again = run(engine, grow(engine, sampling=sampling), grow(engine, sampling=sampling))
    assert engine._replicas[0].protocol is not None and engine._replicas[0].protocol.name == expected
    assert max(worst_error(policy, tree, 0.7) for tree in once) < 1e-4
    assert [[n.tokens for n in tree.nodes] for tree in once] == [[n.tokens for n in tree.nodes] for tree in again]


def test_vllm_loads_new_weights(url: str, folder: Path, tmp_path: Path) -> None:
    policy = causal_lm.load(str(folder))
    engine = engine_of(policy, tmp_path, url, timeout_s=200)

    async def steps() -> None:
        await follows_updates(engine, policy, lambda _: shaken(policy))
        policy.load_state_dict(causal_lm.load(str(folder)).state_dict())
        await engine.load_weights(3)

    run(engine, steps)


def test_vllm_that_sends_log_probs_before_temperature_is_told_how_to_be_started(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as url:
        engine = engine_of(causal_lm.load(str(folder)), tmp_path, url, timeout_s=200)
        with pytest.raises(EngineError, match="start vLLM with --logprobs-mode processed_logprobs"):
            run(engine, grow(engine))


def test_vllm_loads_adapters(folder: Path, tmp_path: Path) -> None:
    policy = causal_lm.load(str(folder))
    lora.attach(policy, LoraSettings(rank=8), str(folder), seed=0)
    with serving(folder, *RIGHT, *ADAPTERS) as url:
        for dialect in ("vllm", "completions"):
            engine = engine_of(policy, tmp_path, url, dialect=dialect, timeout_s=200)

            run(engine, lambda engine=engine: follows_updates(engine, policy, lambda n: stir(policy, seed=n)))


def test_vllm_without_lora_is_told_how_to_be_started(url: str, folder: Path, tmp_path: Path) -> None:
    policy = causal_lm.load(str(folder))
    lora.attach(policy, LoraSettings(rank=8), str(folder), seed=0)
    engine = engine_of(policy, tmp_path, url, timeout_s=200)
    with pytest.raises(EngineError, match=r"LoRA is not enabled.*start vLLM with --enable-lora"):
        run(engine, lambda: engine.load_weights(1))
