"""The engine over HTTP: what it samples is what the model would, whatever happens to its servers."""

import asyncio
import json
import logging
import signal
from dataclasses import replace

import pytest
import torch
from starlette.responses import JSONResponse, Response

from tests.support.servers import Cut, Served, engine_of, refusing, subprocess_serving
from tests.support.small_runs import save_model, small_config, write_config
from treepo.engines import Sampling
from treepo.engines.local.engine import LocalEngine
from treepo.engines.remote.protocols import (
    WIRE_PROTOCOLS,
    SegmentRequest,
    CollectiveRPC,
    FromDisk,
    SegmentReply,
    checked,
    recognised,
    update_of,
)
from treepo.engines.settings import LocalSettings, ServerSettings
from treepo.engines.weight_check import SAMPLING as PROBED_WITH
from treepo.engines.weight_check import Probe, mismatch, probe, probe_tree
from treepo.errors import ConfigError, EngineError
from treepo.models import causal_lm
from treepo.models.attention import Causal
from treepo.models.causal_lm import create
from treepo.run.config import load
from treepo.run.folder import read_metrics
from treepo.run.trainer import Trainer
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import ROOT, Stop, Tree, read_trees

PROMPTS = [(f"q{i}", [5 + i, 6, 7 + 2 * i]) for i in range(6)]
SHAPE = {"width": 6, "segment_tokens": 5, "max_depth": 4}
GENERATE = "/inference/v1/generate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(folder):
    return causal_lm.load(str(folder))


@pytest.fixture(scope="module")
def served(folder):
    with Served(folder) as server:
        yield server


def run(engine, *works):
    """The results of functions of a running engine, which is closed at the end."""

    async def all_of_them():
        try:
            return [await work() for work in works]
        finally:
            await engine.close()

    found = asyncio.run(all_of_them())
    return found[0] if len(found) == 1 else found


def grow(engine, prompts=PROMPTS, stop_ids=(0,), seed=0, **more):
    sampler = Sampler(engine, SamplerSettings(**SHAPE | more), str, frozenset(stop_ids))
    return lambda: sampler.grow_all(prompts, seed)


def worst_error(model, tree, temperature=1.0):
    """Largest difference in nats between the tree's log-probs and those of plain forward passes."""
    worst = 0.0
    for leaf in tree.leaves():
        if tree.nodes[leaf].stop is Stop.ERROR:
            continue
        ids = torch.tensor([tree.tokens(leaf)])
        with torch.no_grad():
            states = causal_lm.hidden(model, ids, torch.arange(ids.shape[1])[None], Causal())
            logits = causal_lm.logits(model, states)[0, len(tree.prompt) - 1 : -1] / temperature
        plain = logits.log_softmax(-1).gather(1, ids[0, len(tree.prompt) :, None])[:, 0]
        sampled = torch.tensor([lp for node in tree.path(leaf) for lp in tree.nodes[node].logprobs])
        worst = max(worst, (plain - sampled).abs().max().item())
    return worst


def intact(trees, width=6):
    """Every tree is complete, with nothing lost."""
    assert len(trees) == len(PROMPTS)
    for tree in trees:
        assert len(tree.leaves()) == width
        for index, node in enumerate(tree.nodes[1:], 1):
            assert (node.stop is None) == bool(tree.children[index])
            assert len(node.tokens) == len(node.logprobs) and node.stop is not Stop.ERROR
    return True


def shaken(model, by=0.3):
    """Move all weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * parameter.std() * torch.randn(parameter.shape, generator=generator))


# What is sampled ------------------------------------------------------------------------------------------------------


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


def test_a_greedy_segment_is_drawn_from_point_masses(served, policy, tmp_path):
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


# Dialects -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "dialect", "update"),
    [
        ({"/inference/v1/generate", "/v1/completions", "/collective_rpc"}, "vllm", CollectiveRPC),
        ({"/v1/completions", "/v1/chat/completions"}, "completions", None),
        ({"/v1/completions", "/generate", "/v1/models", "/update_weights_from_disk"}, "sglang", FromDisk),
        ({"/inference/v1/generate", "/generate", "/update_weights_from_disk"}, "vllm", FromDisk),
        ({"/api/chat"}, None, None),
    ],
)
def test_a_server_is_known_by_its_paths(paths, dialect, update):
    found = recognised(paths)
    assert (found and found.name) == dialect
    assert type(update_of(paths)) is (update or type(None))


OLD, NEW = "/get_model_info", "/model_info"


@pytest.mark.parametrize(
    ("hidden", "path"),
    [(set(), "/generate"), ({OLD}, "/generate"), ({NEW}, "/generate"), ({OLD, NEW}, "/v1/completions")],
)
def test_a_server_that_hides_its_description_is_known_by_what_it_answers(folder, policy, tmp_path, hidden, path):
    missing = Response(status_code=404)
    with Served(folder, intercept=lambda p, _: missing if p in hidden | {"/openapi.json"} else None) as server:
        engine = engine_of(policy, tmp_path, server)
        assert intact(run(engine, grow(engine)))
        assert server.asked[-1][0] == path


def test_a_server_of_another_kind_is_refused(folder, policy, tmp_path):
    with Served(folder, intercept=lambda *_: JSONResponse({"paths": {"/api": {}}})) as server:
        engine = engine_of(policy, tmp_path, server)
        with pytest.raises(EngineError, match="names no model: is this an inference server"):
            run(engine, engine.start)
    other = JSONResponse({"paths": {"/api/chat": {}}})
    with Served(folder, intercept=lambda path, _: other if path == "/openapi.json" else None) as server:
        engine = engine_of(policy, tmp_path, server)
        with pytest.raises(EngineError, match="speaks none of /inference/v1/generate"):
            run(engine, engine.start)


ASK = SegmentRequest([1, 2], 3, 7, Sampling(), {9})


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (SegmentReply([], [], "stop"), "0 tokens where 1 to 3"),
        (SegmentReply([1, 2, 3, 4], [-1.0] * 4, "length"), "4 tokens where 1 to 3"),
        (SegmentReply([1, 2], [-1.0], "length"), "2 tokens with 1 log-probs"),
        (SegmentReply([1, 2], [-1.0, -9999.0], "length"), r"sent -9999\.0 as log-prob of token 2"),
        (SegmentReply([1, 2], [-1.0, float("nan")], "length"), "sent nan as log-prob"),
        (SegmentReply([1, 2], [-1.0, -1.0], "abort"), "gave the request up"),
    ],
)
def test_a_reply_that_is_no_segment_is_refused(reply, message):
    with pytest.raises(EngineError, match=message):
        checked(ASK, reply)


def test_what_a_server_sends_after_a_stop_id_is_cut_off():
    assert checked(ASK, SegmentReply([1, 9, 3], [-1.0, -2.0, -3.0], "length")) == ([1, 9], [-1.0, -2.0])


def test_sglangs_tokens_are_those_with_log_probs_and_its_seeds_have_31_bits():
    dialect = WIRE_PROTOCOLS["sglang"]
    meta = {"finish_reason": {"type": "stop", "matched": 9}, "weight_version": "w"}
    reply = {"output_ids": [1], "meta_info": {**meta, "output_token_logprobs": [[-1.0, 1, None], [-2.0, 9, None]]}}
    assert dialect.read(reply) == SegmentReply([1, 9], [-1.0, -2.0], "stop", "w")
    body = dialect.body("m", SegmentRequest([1, 2], 3, (1 << 62) + 5, Sampling(), {9}))
    assert body["sampling_params"]["sampling_seed"] == 5 and body["sampling_params"]["ignore_eos"] is False


def test_every_request_says_all_of_its_distribution_and_its_own_seed(served, policy, tmp_path):
    engine = engine_of(policy, tmp_path, served)
    begin = len(served.asked)
    run(engine, grow(engine, sampling=Sampling(temperature=0.5, top_k=7)))
    bodies = [json.loads(body)["sampling_params"] for path, body in served.asked[begin:] if path == GENERATE]
    assert len({body["seed"] for body in bodies}) == len(bodies) > 30
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
    for body in bodies[1:]:  # the first is the probe
        assert body.items() >= {"temperature": 0.5, "top_k": 7, "top_p": 1.0, "ignore_eos": True, **neutral}.items()


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_in_passing_is_asked_again(folder, policy, tmp_path, status):
    with Served(folder, intercept=refusing(status, 2, GENERATE, "/v1/models")) as server:
        engine = engine_of(policy, tmp_path, server)
        assert intact(run(engine, grow(engine, retries=0)))


def test_a_request_that_fails_for_ever_costs_its_leaf_and_not_the_server(folder, policy, tmp_path):
    with Served(
        folder, intercept=lambda path, n: Response("no", 500) if path == GENERATE and n > 1 else None
    ) as server:
        engine = engine_of(policy, tmp_path, server, retries=1)
        (tree,) = run(engine, grow(engine, PROMPTS[:1], retries=0, width=2))
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {Stop.ERROR}


def test_a_request_that_takes_too_long_is_given_up_with_advice(folder, policy, tmp_path):
    with Served(folder, intercept=lambda path, n: 2.0 if path == GENERATE and n > 1 else None) as server:
        engine = engine_of(policy, tmp_path, server, timeout_s=0.3)

        async def ask():
            handle = await engine.open(Tree([1, 2]), Sampling(), ())
            await handle.generate(ROOT, 3, 1)

        with pytest.raises(EngineError, match=r"no answer in 0\.3 s: raise engine\.timeout_s"):
            run(engine, ask)


def test_a_wrong_or_missing_api_key_is_said_at_once(folder, policy, tmp_path, monkeypatch):
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


def test_where_nobody_answers_the_error_says_who_and_why(policy, tmp_path):
    engine = engine_of(policy, tmp_path, "http://127.0.0.1:9", "http://127.0.0.1:1", retries=0)
    with pytest.raises(EngineError, match=r"no server answers \(http://127\.0\.0\.1:9: ConnectError.*engine\.urls"):
        run(engine, engine.start)


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


@pytest.mark.slow
def test_the_trees_of_a_server_that_is_killed_go_on_at_another(folder, policy, tmp_path, caplog):
    with subprocess_serving(folder) as (process, url), Served(folder) as left:
        engine = engine_of(policy, tmp_path, url, left, retries=1, revive_s=60)

        async def kill():
            growing = asyncio.ensure_future(grow(engine, max_depth=12, width=8)())
            while len(left.asked) < 40:
                await asyncio.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            return await growing

        with caplog.at_level(logging.WARNING):
            trees = run(engine, kill)
    assert intact(trees, 8) and max(worst_error(policy, tree) for tree in trees) < 1e-4
    (said,) = [r.getMessage() for r in caplog.records if "is dead" in r.getMessage()]
    assert url in said and "3 open trees go on at the 1 servers left" in said


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


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_after_an_update_servers_decode_with_the_new_weights(folder, policy, tmp_path, dialect):
    before = causal_lm.load(str(folder))
    with Served(folder) as one, Served(folder) as two:
        engine = engine_of(policy, tmp_path / "weights", one, two, dialect=dialect)
        trees = []

        async def steps():
            for version in (1, 2):
                shaken(policy)
                await engine.load_weights(version)
                trees.append(await grow(engine)())
                assert max(worst_error(policy, tree) for tree in trees[-1]) < 1e-4

        run(engine, steps)
    assert {node.version for tree in trees[0] for node in tree.nodes[1:]} == {1}
    assert {node.version for tree in trees[1] for node in tree.nodes[1:]} == {2}
    assert max(worst_error(before, tree) for tree in trees[1]) > 0.01
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


def test_a_server_with_other_weights_gets_the_models_before_the_first_tree(folder, policy, tmp_path):
    shaken(policy)
    with Served(folder) as server:
        engine = engine_of(policy, tmp_path, server)
        trees = run(engine, grow(engine))
    assert max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_weights_that_somebody_else_has_changed_are_sent_again(folder, policy, tmp_path):
    import httpx2

    with Served(folder) as server:
        engine = engine_of(policy, tmp_path, server)
        shaken(policy)

        async def meddle():
            await engine.load_weights(1)
            async with httpx2.AsyncClient(base_url=server.url) as client:
                assert (await client.post(FromDisk.path, json={"model_path": str(folder)})).status_code == 200
            return await grow(engine)()

        trees = run(engine, meddle)
        assert server.count(FromDisk.path) == 3
    assert max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_two_runs_that_send_weights_to_one_server_do_not_do_so_for_ever(folder, policy, tmp_path):
    other = causal_lm.load(str(folder))
    shaken(other)
    with Served(folder) as server:
        engines = [engine_of(policy, tmp_path / "a", server), engine_of(other, tmp_path / "b", server)]

        async def fight():
            for engine in engines:
                await engine.load_weights(1)
            trees = await asyncio.wait_for(asyncio.gather(*(grow(engine, retries=0)() for engine in engines)), 60)
            await engines[1].close()
            return trees

        for model, trees in zip((policy, other), run(engines[0], fight), strict=True):
            assert max(worst_error(model, tree) for tree in trees) < 1e-4, "what comes back is from the right weights"


def test_after_a_broken_connection_a_server_must_show_its_weights_again(folder, policy, tmp_path):
    old = causal_lm.load(str(folder)).state_dict()

    def restart(path, count):
        if path != GENERATE or count != 12:
            return None
        server.model.load_state_dict(old)  # as a process that starts anew
        return Cut()

    with Served(folder, intercept=restart) as server:
        engine = engine_of(policy, tmp_path, server)
        shaken(policy)

        async def go_on():
            await engine.load_weights(1)
            return await grow(engine, PROMPTS[:1], width=12, retries=0)()

        (tree,) = run(engine, go_on)
        assert server.count(FromDisk.path) == 2
    assert len(tree.leaves()) == 12 and Stop.ERROR not in {node.stop for node in tree.nodes}


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


def test_weights_do_not_change_under_an_open_tree(served, policy, tmp_path):
    engine = engine_of(policy, tmp_path, served)

    async def ask():
        await engine.open(Tree([1, 2]), Sampling(), ())
        with pytest.raises(RuntimeError, match="1 trees are open"):
            await engine.load_weights(1)

    run(engine, ask)


def test_an_engine_belongs_to_one_event_loop(served, policy, tmp_path):
    engine = engine_of(policy, tmp_path, served)

    async def twice():
        await engine.start()
        await engine.start()
        await engine.close()

    asyncio.run(twice())
    with pytest.raises(RuntimeError, match="one event loop"):
        asyncio.run(engine.start())


def test_a_probe_knows_an_update_that_was_ignored():
    def answer(logprobs, expected):
        return Probe([1, 2], logprobs, expected, [-9.0, -9.0])

    before = answer([-1.0, -2.0], [-1.0, -2.0])
    assert not answer([-1.0, -2.0], [-1.0, -2.0]).ignored_update(None)
    assert not answer([-1.0, -2.0], [-1.0, -2.0001]).ignored_update(before), "the model hardly moved"
    assert answer([-1.0, -2.0], [-1.0, -2.01]).ignored_update(before)
    assert not answer([-1.0, -2.02], [-1.0, -2.01]).ignored_update(before)
    assert answer([-1.0, -2.02], [-1.5, -2.0]).difference == 0.5


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


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_training_through_a_server_is_training_on_the_local_engine(tmp_path):
    (tmp_path / "local").mkdir()
    config = small_config(tmp_path / "local", "warmup.steps=60", "trainer.save_trees_every=1", "trainer.eval_every=2")
    tokenizer = config.task.tokenizer()
    start = tmp_path / "start"
    create(config.model.create, tokenizer, 3).save_pretrained(start)
    tokenizer.save_pretrained(start)
    with Served(start) as server:
        given = ["trainer.save_trees_every=1", "trainer.eval_every=2", "warmup.steps=60"]
        remote = small_config(tmp_path, *given, "engine.kind=server", f"engine.urls=[{server.url}]")
        for settings in (config, remote):
            with Trainer(settings) as trainer:
                trainer.run()
        assert server.count(FromDisk.path) == 3, "at the start and after each step"
    runs = [tmp_path / "local" / "run", tmp_path / "run"]
    for step in (1, 2):
        one, two = (list(read_trees(run / "trees" / f"step-00000{step}.jsonl.gz")) for run in runs)
        assert [[n.tokens for n in r.tree.nodes] for r in one] == [[n.tokens for n in r.tree.nodes] for r in two]
        assert {n.version for r in two for n in r.tree.nodes[1:]} == {step - 1}
    one, two = (read_metrics(run / "metrics.jsonl") for run in runs)
    for a, b in zip(one, two, strict=True):
        assert a.get("evaluation") == b.get("evaluation")
        if "grad_norm" in a:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_an_engine_without_a_kind_is_local_and_a_wrong_one_is_explained(tmp_path):
    path = write_config(tmp_path)
    assert load(path, ["engine={slots: 7}"]).engine == LocalSettings(slots=7)
    remote = load(path, ["engine={kind: server, urls: [http://a:1/v1, 'https://b/']}"]).engine
    assert isinstance(remote, ServerSettings) and remote.urls == ["http://a:1", "https://b"]
    for override, message in (
        ("engine.kind=servr", r"engine: kind 'servr' is none of local, server, vllm; did you mean 'server'\?"),
        ("engine={kind: server}", r"engine\.urls: is required"),
        ("engine={kind: server, urls: [a:1]}", r"engine\.urls: 'a:1' is no address such as http"),
        ("engine={kind: server, urls: [http://a, http://a/]}", "http://a is listed twice"),
        ("engine={kind: server, urls: [http://a], slots: 3}", r"engine\.slots: unknown key"),
        ("engine={slotz: 3}", r"engine\.slotz: unknown key; did you mean 'slots'\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(path, [override])


def test_a_run_ahead_trains_on_trees_that_are_one_step_old_and_sees_every_problem_once(tmp_path):
    config = small_config(tmp_path, "warmup.steps=60")
    start = tmp_path / "start"
    create(config.model.create, config.task.tokenizer(), 3).save_pretrained(start)
    config.task.tokenizer().save_pretrained(start)
    with Served(start) as server:
        ahead = ["trainer.ahead=true", "loss.rollout_cap=2.0", "trainer.steps=4", "trainer.save_trees_every=1"]
        shape = ["trainer.dynamic_sampling=null", "trainer.eval_every=2", "engine.kind=server"]
        with Trainer(small_config(tmp_path, *ahead, *shape, f"engine.urls=[{server.url}]")) as trainer:
            trainer.run()
    run = tmp_path / "run"
    steps = [m for m in read_metrics(run / "metrics.jsonl") if "staleness" in m]
    assert [m["staleness"] for m in steps] == [0, 1, 1, 1] and not any(m["mixed_versions"] for m in steps)
    keys = [r.tree.key for n in range(1, 5) for r in read_trees(run / "trees" / f"step-{n:06d}.jsonl.gz")]
    assert [int(key.split("/")[1]) for key in keys] == list(range(16))


@pytest.mark.parametrize(
    ("given", "why"),
    [(["engine.kind=local"], "weights of its own"), (["engine={kind: server, urls: ['http://x']}"], "rollout_cap")],
)
def test_a_run_ahead_wants_another_engine_and_a_correction(tmp_path, given, why):
    with pytest.raises(ConfigError, match=why):
        small_config(tmp_path, "trainer.ahead=true", *given)
