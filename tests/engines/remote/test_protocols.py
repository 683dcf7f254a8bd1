"""Wire protocols: which one a server has, what a request contains, which replies are refused."""

from __future__ import annotations

import json

import pytest
from starlette.responses import JSONResponse, Response

from tests.support.engine_trees import (
    grow,
    intact,
    run,
)
from tests.support.servers import GENERATE, Served, engine_of
from treepo.engines import Sampling
from treepo.engines.remote.protocols import (
    WIRE_PROTOCOLS,
    CollectiveRPC,
    FromDisk,
    SegmentReply,
    SegmentRequest,
    checked,
    recognised,
    update_of,
)
from treepo.errors import EngineError

OLD, NEW = "/get_model_info", "/model_info"
ASK = SegmentRequest([1, 2], 3, 7, Sampling(), {9})


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
def test_a_server_is_recognised_by_its_paths(paths, dialect, update):
    found = recognised(paths)
    assert (found and found.name) == dialect
    assert type(update_of(paths)) is (update or type(None))


@pytest.mark.parametrize(
    ("hidden", "path"),
    [(set(), "/generate"), ({OLD}, "/generate"), ({NEW}, "/generate"), ({OLD, NEW}, "/v1/completions")],
)
def test_a_server_without_a_description_is_recognised_by_its_answers(folder, policy, tmp_path, hidden, path):
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
def test_a_reply_that_does_not_fit_its_request_is_refused(reply, message):
    with pytest.raises(EngineError, match=message):
        checked(ASK, reply)


def test_tokens_after_a_stop_id_are_dropped():
    assert checked(ASK, SegmentReply([1, 9, 3], [-1.0, -2.0, -3.0], "length")) == ([1, 9], [-1.0, -2.0])


def test_sglangs_tokens_are_those_with_log_probs_and_its_seeds_have_31_bits():
    dialect = WIRE_PROTOCOLS["sglang"]
    meta = {"finish_reason": {"type": "stop", "matched": 9}, "weight_version": "w"}
    reply = {"output_ids": [1], "meta_info": {**meta, "output_token_logprobs": [[-1.0, 1, None], [-2.0, 9, None]]}}
    assert dialect.read(reply) == SegmentReply([1, 9], [-1.0, -2.0], "stop", "w")
    body = dialect.body("m", SegmentRequest([1, 2], 3, (1 << 62) + 5, Sampling(), {9}))
    assert body["sampling_params"]["sampling_seed"] == 5 and body["sampling_params"]["ignore_eos"] is False


def test_every_request_names_its_whole_distribution_and_its_own_seed(served, policy, tmp_path):
    engine = engine_of(policy, tmp_path, served)
    begin = len(served.asked)
    run(engine, grow(engine, sampling=Sampling(temperature=0.5, top_k=7)))
    bodies = [json.loads(body)["sampling_params"] for path, body in served.asked[begin:] if path == GENERATE]
    assert len({body["seed"] for body in bodies}) == len(bodies) > 30
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
    for body in bodies[1:]:  # the first is the probe
        assert body.items() >= {"temperature": 0.5, "top_k": 7, "top_p": 1.0, "ignore_eos": True, **neutral}.items()
