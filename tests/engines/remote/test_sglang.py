"""A real SGLang server, on a CPU. Needs the environment that `make venv-sglang` makes; `make test-sglang` runs it.

The server has that environment, and this module the usual one. On CPUs SGLang has neither deterministic sampling nor
LoRA, so of seeds and adapters nothing is shown here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.support.engine_trees import follows_updates, grow, intact, run, shaken, worst_error
from tests.support.real_servers import running, save_servable
from tests.support.servers import engine_of
from tests.support.small_runs import small_config
from treepo.engines import Sampling
from treepo.errors import EngineError
from treepo.models import causal_lm
from treepo.run.build import training
from treepo.run.config import changed
from treepo.tree import ROOT, Tree

SUPPORT = Path(__file__).parents[2] / "support"
PYTHON = SUPPORT.parents[1] / ".venv-sglang" / "bin" / "python"
FLAGS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--dtype": "float32",
    "--max-total-tokens": "65536",
    "--max-running-requests": "64",
}
pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no SGLang: `make test-sglang`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    flags = [text for pair in FLAGS.items() for text in pair]
    command = [PYTHON, "-m", "sglang.launch_server", "--skip-server-warmup", "--model-path", folder, *flags]
    with running(command, {"PYTHONPATH": str(SUPPORT / "sglang_cpu"), "OMP_NUM_THREADS": "1"}) as url:
        yield url


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sglang_samples_what_the_model_would(url: str, folder: Path, tmp_path: Path, temperature: float) -> None:
    policy = causal_lm.load(str(folder))
    engine = engine_of(policy, tmp_path, url, timeout_s=200)
    trees = run(engine, grow(engine, sampling=Sampling(temperature=temperature)))
    dialect = engine._replicas[0].protocol
    assert dialect is not None and dialect.name == "sglang", "it has /v1/completions, too"
    assert intact(trees) and max(worst_error(policy, tree, temperature) for tree in trees) < 1e-4


def test_sglang_keeps_every_token_of_a_prefix(url: str, folder: Path, tmp_path: Path) -> None:
    engine = engine_of(causal_lm.load(str(folder)), tmp_path, url, timeout_s=200)
    tree = run(engine, grow(engine, seed=5))[0]
    body = {"input_ids": tree.tokens(tree.leaves()[0]), "sampling_params": {"max_new_tokens": 1}}
    meta = httpx2.post(f"{url}/generate", json=body, timeout=60).json()["meta_info"]
    # Of the last token that was sampled no key-values were needed, and of a prefix the last token is always computed.
    assert meta["cached_tokens"] >= meta["prompt_tokens"] - 2 > 10


def test_sglang_ends_segments_with_a_stop_id_and_survives_an_abandoned_request(
    url: str, folder: Path, tmp_path: Path
) -> None:
    engine = engine_of(causal_lm.load(str(folder)), tmp_path, url, timeout_s=200)
    stops = set(range(20, 26))  # about half of the segments end early; seeds decide nothing on a CPU

    async def ask() -> list[list[int]]:
        handle = await engine.open(Tree([1, 2]), Sampling(), stops)
        long = asyncio.ensure_future(handle.generate(ROOT, 200, 99))
        await asyncio.sleep(0.05)
        long.cancel()
        segments = await asyncio.gather(*(handle.generate(ROOT, 12, seed) for seed in range(20)))
        handle.close()
        return [segment.tokens for segment in segments]

    segments = run(engine, ask)
    for tokens in segments:
        assert len(tokens) == 12 or tokens[-1] in stops | {0}
        assert not stops & set(tokens[:-1])
    assert {len(tokens) < 12 for tokens in segments} == {True, False}


def test_sglang_loads_new_weights(url: str, folder: Path, tmp_path: Path) -> None:
    policy = causal_lm.load(str(folder))
    engine = engine_of(policy, tmp_path, url, timeout_s=200)

    async def steps() -> None:
        await follows_updates(engine, policy, lambda _: shaken(policy))
        policy.load_state_dict(causal_lm.load(str(folder)).state_dict())
        await engine.load_weights(3)

    run(engine, steps)


def test_log_probs_that_sglang_does_not_have_are_refused(url: str, folder: Path, tmp_path: Path) -> None:
    engine = engine_of(causal_lm.load(str(folder)), tmp_path, url, timeout_s=200)
    with pytest.raises(EngineError, match="before top_k and top_p"):
        run(engine, grow(engine, sampling=Sampling(top_p=0.9)))


def test_a_run_trains_on_sglang(url: str, folder: Path, tmp_path: Path) -> None:
    config = changed(
        small_config(tmp_path),
        ["model.create=null", "warmup=null", f"model.path={folder}", "engine.kind=server", f"engine.urls=[{url}]"],
    )
    with training(config) as trainer:
        trainer.run()
        assert trainer.state.step == 2 and trainer.actor.engine.version == 2
