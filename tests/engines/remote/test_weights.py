"""No server gets a tree before it decodes with the right weights, even after a failure or a restart."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from starlette.responses import JSONResponse

from tests.support.engine_trees import EXACT, PROMPTS, follows_updates, grow, intact, run, shaken, worst_error, worst_of
from tests.support.servers import GENERATE, Cut, Served, engine_of
from treepo.engines import Sampling
from treepo.engines.remote.protocols import (
    FromDisk,
)
from treepo.engines.weight_check import SAMPLING as PROBED_WITH
from treepo.engines.weight_check import mismatch, probe, probe_tree
from treepo.errors import EngineError
from treepo.models import causal_lm
from treepo.tree import Stop, Tree


def test_a_server_that_comes_back_gets_the_weights_before_it_gets_trees(folder, policy, tmp_path, caplog):
    with Served(folder) as one, Served(folder) as two:
        engine = engine_of(policy, tmp_path, one, two, retries=0, revive_s=0)
        shaken(policy)

        async def die():
            await engine.load_weights(1)
            two.stop()
            return await grow(engine)()

        async def come_back():
            with Served(folder, port=two.port) as again:  # with its old weights
                trees = []
                while not any(path == GENERATE for path, _ in again.asked[2:]) and len(trees) < 200:
                    trees = await grow(engine)()
                order = [path for path, _ in again.asked]
                assert order.index("/update_weights_from_disk") < order.index(GENERATE)
                return await grow(engine, seed=1)()

        with caplog.at_level(logging.WARNING):
            first, second = run(engine, die, come_back)
    for trees in (first, second):
        assert intact(trees) and max(worst_error(policy, tree) for tree in trees) < 1e-4
    assert any("is back, with version 1" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_after_an_update_servers_decode_with_the_new_weights(folder, policy, tmp_path, dialect):
    before = causal_lm.load(str(folder))
    with Served(folder) as one, Served(folder) as two:
        engine = engine_of(policy, tmp_path / "weights", one, two, dialect=dialect)
        _, last = run(engine, lambda: follows_updates(engine, policy, lambda _: shaken(policy)))
    assert worst_of(before, last) > 0.01
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version-000002"], "older ones are gone"


@pytest.mark.parametrize("by", [0.3, 0.02])
def test_a_server_that_ignores_an_update_is_refused(folder, policy, tmp_path, by):
    done = JSONResponse({"success": True, "message": "", "num_paused_requests": 0})
    with Served(folder, intercept=lambda path, _: done if path == FromDisk.path else None) as server:
        engine = engine_of(policy, tmp_path, server, tolerance=0.05)

        async def step():
            await engine.load_weights(0)
            shaken(policy, by)
            await engine.load_weights(1)

        with pytest.raises(EngineError, match=f"{server.url}, version 1 of the weights: it answers as before"):
            run(engine, step)


def test_a_server_that_gets_an_update_wrong_is_refused(folder, policy, tmp_path):
    def wrongly(path, count):
        if path != FromDisk.path or count == 1:
            return None
        shaken(server.model)
        return JSONResponse({"success": True, "message": "", "num_paused_requests": 0})

    with Served(folder, intercept=wrongly) as server:
        engine = engine_of(policy, tmp_path, server)

        async def step():
            await engine.load_weights(0)
            shaken(policy, 0.1)
            await engine.load_weights(1)

        with pytest.raises(EngineError, match=r"version 1 of the weights: log-probs of a probe differ by up to 0\.\d+"):
            run(engine, step)


def test_a_server_that_cannot_be_updated_can_be_sampled_from_if_it_has_the_weights(folder, policy, tmp_path):
    fixed = JSONResponse({"paths": {GENERATE: {}}})
    with Served(folder, intercept=lambda path, _: fixed if path == "/openapi.json" else None) as server:
        engine = engine_of(policy, tmp_path, server)
        assert intact(run(engine, grow(engine)))
        engine = engine_of(policy, tmp_path, server)
        with pytest.raises(EngineError, match="cannot take new weights: start vLLM with VLLM_SERVER_DEV_MODE=1"):
            run(engine, lambda: engine.load_weights(0))
        shaken(policy)
        engine = engine_of(policy, tmp_path, server)
        with pytest.raises(EngineError, match="it serves another model"):
            run(engine, grow(engine))


@pytest.mark.parametrize("servers", [1, 3])
def test_servers_with_other_weights_get_the_models_before_the_first_tree(folder, policy, tmp_path, servers, caplog):
    shaken(policy)
    with ExitStack() as stack:
        several = [stack.enter_context(Served(folder)) for _ in range(servers)]
        engine = engine_of(policy, tmp_path, *several)
        with caplog.at_level(logging.WARNING):
            trees = run(engine, grow(engine))
        assert all(server.loaded(FromDisk.path, "model_path") for server in several)
    assert intact(trees) and worst_of(policy, trees) < EXACT
    assert sum("gets the model's weights" in r.getMessage() for r in caplog.records) >= 1


def test_weights_that_somebody_else_has_changed_are_sent_again(folder, policy, tmp_path):

    with Served(folder) as server:
        engine = engine_of(policy, tmp_path, server)
        shaken(policy)

        async def meddle():
            await engine.load_weights(1)
            async with httpx2.AsyncClient(base_url=server.url) as client:
                assert (await client.post(FromDisk.path, json={"model_path": str(folder)})).status_code == 200
            return await grow(engine)()

        trees = run(engine, meddle)
        # Ours, the other one, and ours again. A request that was under way may have found the other weights, too.
        assert [Path(name).name for name in server.loaded(FromDisk.path, "model_path")] == [
            "version-000001",
            folder.name,
            "version-000001",
        ]
    assert max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_two_runs_that_send_weights_to_one_server_come_to_an_end(folder, policy, tmp_path):
    other = causal_lm.load(str(folder))
    shaken(other)
    with Served(folder) as server:
        engines = [engine_of(policy, tmp_path / "a", server), engine_of(other, tmp_path / "b", server)]

        async def fight():
            for engine in engines:
                await engine.load_weights(1)
            trees = await asyncio.gather(*(grow(engine, retries=0)() for engine in engines))
            await engines[1].close()
            return trees

        for model, trees in zip((policy, other), run(engines[0], fight), strict=True):
            assert max(worst_error(model, tree) for tree in trees) < 1e-4, "every segment is from the right weights"


def test_after_a_broken_connection_the_weights_of_a_server_are_checked_again(folder, policy, tmp_path):
    old = causal_lm.load(str(folder)).state_dict()

    def restart(path, count):
        if path != GENERATE or count != 12:
            return None
        server.model.load_state_dict(old)  # as if its process had been started anew
        return Cut()

    with Served(folder, intercept=restart) as server:
        engine = engine_of(policy, tmp_path, server)
        shaken(policy)

        async def go_on():
            await engine.load_weights(1)
            return await grow(engine, PROMPTS[:1], width=12, retries=0)()

        (tree,) = run(engine, go_on)
        assert server.count(FromDisk.path) >= 2
    assert len(tree.leaves()) == 12 and Stop.ERROR not in {node.stop for node in tree.nodes}


def test_weights_do_not_change_under_an_open_tree(served, policy, tmp_path):
    engine = engine_of(policy, tmp_path, served)

    async def ask():
        await engine.open(Tree([1, 2]), Sampling(), ())
        with pytest.raises(RuntimeError, match="1 trees are open"):
            await engine.load_weights(1)

    run(engine, ask)


def test_a_server_that_sends_log_probs_before_temperature_is_told_how_to_be_started(served, policy, tmp_path):
    """As vLLM does by default: a reply sampled at the probe's temperature with the log-probs at temperature 1."""

    async def raw():
        tree = probe_tree(policy)
        handle = await engine.open(tree, PROBED_WITH, ())
        found = await probe(handle, tree, policy)
        assert mismatch(found, None, 1e-3) is None
        return mismatch(replace(found, logprobs=found.raw), None, 1e-3)

    engine = engine_of(policy, tmp_path, served)
    assert "start vLLM with --logprobs-mode processed_logprobs" in run(engine, raw)
