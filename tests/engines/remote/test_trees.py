"""Trees from servers have the log-probs of the model, and each tree stays at one server."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.engine_trees import (
    PROMPTS,
    SHAPE,
    grow,
    intact,
    run,
    worst_error,
)
from tests.support.servers import GENERATE, Served, engine_of
from treepo.engines import Sampling
from treepo.engines.local.engine import LocalEngine
from treepo.engines.remote.protocols import (
    WIRE_PROTOCOLS,
)
from treepo.errors import EngineError
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import ROOT, Tree


@pytest.mark.parametrize("dialect", ["auto", *WIRE_PROTOCOLS])
def test_trees_from_a_server_have_the_log_probs_of_the_model(served, policy, tmp_path, dialect):
    engine = engine_of(policy, tmp_path, served, dialect=dialect)
    trees = run(engine, grow(engine, sampling=Sampling(temperature=0.7)))
    assert intact(trees) and max(worst_error(policy, tree, 0.7) for tree in trees) < 1e-4
    assert {served.asked[-1][0]} == {WIRE_PROTOCOLS["vllm" if dialect == "auto" else dialect].path}


@pytest.mark.parametrize("dialect", ["vllm", "completions"])
def test_the_same_seeds_draw_the_same_trees_from_a_server_as_in_this_process(served, policy, tmp_path, dialect):
    engine = engine_of(policy, tmp_path, served, dialect=dialect)
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9)
    remote = run(engine, grow(engine, sampling=sampling))
    local = Sampler(LocalEngine(policy), SamplerSettings(**SHAPE, sampling=sampling), str, {0}).sample(PROMPTS, 0)
    for a, b in zip(remote, local, strict=True):
        assert [(n.parent, n.tokens, n.seed, n.stop) for n in a.nodes] == [
            (n.parent, n.tokens, n.seed, n.stop) for n in b.nodes
        ]
        for x, y in zip(a.nodes, b.nodes, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


@pytest.mark.parametrize("dialect", WIRE_PROTOCOLS)
def test_a_stop_id_is_the_last_token_of_its_segment_and_nothing_else_ends_one(served, policy, tmp_path, dialect):
    engine = engine_of(policy, tmp_path, served, dialect=dialect)
    stops = set(range(20, 40))

    async def ask():
        handle = await engine.open(Tree([1, 2]), Sampling(), stops)
        return await asyncio.gather(*(handle.generate(ROOT, 12, seed) for seed in range(20)))

    segments = run(engine, ask)
    for segment in segments:
        assert len(segment.tokens) == 12 or segment.tokens[-1] in stops | ({0} if dialect == "sglang" else set())
        assert not stops & set(segment.tokens[:-1])
    assert {len(segment.tokens) < 12 for segment in segments} == {True, False}


def test_a_greedy_segment_has_log_probs_of_zero(served, policy, tmp_path):
    engine = engine_of(policy, tmp_path, served)

    async def ask():
        handle = await engine.open(Tree([1, 2]), Sampling(temperature=0), ())
        return [await handle.generate(ROOT, 6, seed) for seed in (1, 2)]

    one, two = run(engine, ask)
    assert one == two and set(one.logprobs) == {0.0}


def test_what_servers_cannot_do_is_refused(served, policy, tmp_path):
    async def entropies():
        await engine.open(Tree([1, 2]), Sampling(), (), entropies=True)

    async def filtered():
        await engine.open(Tree([1, 2]), Sampling(top_p=0.9), ())

    async def long():
        await engine.open(Tree([1] * 128), Sampling(), ())

    engine = engine_of(policy, tmp_path, served, dialect="sglang")
    for work, message in ((entropies, "no entropies"), (filtered, "top_k and top_p"), (long, "share 128")):
        engine = engine_of(policy, tmp_path, served, dialect="sglang")
        with pytest.raises(EngineError, match=message):
            run(engine, work)


def test_trees_stick_to_a_server_and_are_spread_evenly(folder, policy, tmp_path):
    with Served(folder) as one, Served(folder) as two:
        engine = engine_of(policy, tmp_path, one, two)
        assert intact(run(engine, grow(engine)))
        homes = [
            {tuple(json.loads(body)["token_ids"][:3]) for path, body in server.asked if path == GENERATE}
            for server in (one, two)
        ]
    homes = [{home for home in found if list(home) in [p for _, p in PROMPTS]} for found in homes]
    assert not homes[0] & homes[1] and [len(found) for found in homes] == [3, 3]


def test_an_engine_belongs_to_one_event_loop(served, policy, tmp_path):
    engine = engine_of(policy, tmp_path, served)

    async def twice():
        await engine.start()
        await engine.start()
        await engine.close()

    asyncio.run(twice())
    with pytest.raises(RuntimeError, match="one event loop"):
        asyncio.run(engine.start())
