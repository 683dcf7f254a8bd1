"""Servers that fail: requests are sent again, trees move to other servers, and an error tells what to do."""

from __future__ import annotations

import asyncio
import logging
import re
import signal

import pytest
from starlette.responses import Response

from tests.support.engine_trees import (
    PROMPTS,
    grow,
    intact,
    run,
    worst_error,
)
from tests.support.servers import GENERATE, Cut, Served, engine_of, refusing, subprocess_serving
from treepo.engines import Sampling
from treepo.errors import ConfigError, EngineError
from treepo.tree import ROOT, Stop, Tree


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_that_passes_is_asked_again(folder, policy, tmp_path, status):
    with Served(folder, intercept=refusing(status, 2, GENERATE, "/v1/models")) as server:
        engine = engine_of(policy, tmp_path, server)
        assert intact(run(engine, grow(engine, retries=0)))


def test_a_request_that_always_fails_costs_its_leaf_and_not_the_server(folder, policy, tmp_path):
    with Served(
        folder, intercept=lambda path, n: Response("no", 500) if path == GENERATE and n > 1 else None
    ) as server:
        engine = engine_of(policy, tmp_path, server, retries=1)
        (tree,) = run(engine, grow(engine, PROMPTS[:1], retries=0, width=2))
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {Stop.ERROR}


def test_a_request_that_takes_too_long_fails_with_advice(folder, policy, tmp_path):
    # The server answers everything else at once. It never answers this request, so the test lasts `timeout_s`.
    with Served(folder, intercept=lambda path, n: 600.0 if path == GENERATE and n > 1 else None) as server:
        engine = engine_of(policy, tmp_path, server, timeout_s=2.0)

        async def ask():
            handle = await engine.open(Tree([1, 2]), Sampling(), ())
            await handle.generate(ROOT, 3, 1)

        with pytest.raises(EngineError, match=r"no answer in 2 s: raise engine\.timeout_s"):
            run(engine, ask)


def test_a_wrong_or_missing_api_key_is_reported_at_once(folder, policy, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "right")
    monkeypatch.setenv("TEST_WRONG", "wrong")
    with Served(folder, api_key="right") as server:
        for name, message in ((None, "name the variable"), ("TEST_WRONG", r"is the key in \$TEST_WRONG right\?")):
            engine = engine_of(policy, tmp_path, server, api_key_env=name)
            with pytest.raises(EngineError, match=f"401 Unauthorized: the server wants an API key: {message}"):
                run(engine, engine.start)
        engine = engine_of(policy, tmp_path, server, api_key_env="TEST_KEY")
        assert intact(run(engine, grow(engine)))
    with pytest.raises(ConfigError, match="the environment has no TEST_NONE"):
        engine_of(policy, tmp_path, "http://127.0.0.1:1", api_key_env="TEST_NONE")


def test_if_no_server_answers_the_error_names_each_and_its_reason(policy, tmp_path):
    engine = engine_of(policy, tmp_path, "http://127.0.0.1:9", "http://127.0.0.1:1", retries=0)
    with pytest.raises(EngineError, match=r"no server answers \(http://127\.0\.0\.1:9: ConnectError.*engine\.urls"):
        run(engine, engine.start)


@pytest.mark.slow
def test_the_trees_of_a_server_that_is_killed_go_on_at_another(folder, policy, tmp_path, caplog):
    with subprocess_serving(folder) as (process, url), Served(folder) as left:
        engine = engine_of(policy, tmp_path, url, left, retries=1, revive_s=60)

        async def kill():
            growing = asyncio.ensure_future(grow(engine, max_depth=12, width=8)())
            killed = engine._replicas[0]
            # With a request under way, at least one of its three trees is open.
            while not (killed.trees and killed.outstanding and len(left.asked) > 10):
                await asyncio.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            return await growing

        with caplog.at_level(logging.WARNING):
            trees = run(engine, kill)
    assert intact(trees, 8) and max(worst_error(policy, tree) for tree in trees) < 1e-4
    (said,) = [r.getMessage() for r in caplog.records if "is dead" in r.getMessage()]
    assert url in said and re.search("[123] open trees go on at the 1 servers left", said)


def test_a_server_that_breaks_every_connection_is_dead_until_it_no_longer_does(folder, policy, tmp_path):
    with Served(folder, intercept=lambda path, _: Cut() if path == GENERATE and poison[0] else None) as server:
        poison = [False]
        engine = engine_of(policy, tmp_path, server, retries=1)

        async def ask():
            handle = await engine.open(Tree([1, 2]), Sampling(), ())
            await handle.generate(ROOT, 3, 1)
            poison[0] = True
            with pytest.raises(EngineError, match="no server answers"):
                await handle.generate(ROOT, 3, 2)
            poison[0] = False
            await asyncio.sleep(1.1)
            return await handle.generate(ROOT, 3, 3)

        assert len(run(engine, ask).tokens) == 3
