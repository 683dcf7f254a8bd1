"""`treepo serve`: replies as vLLM and SGLang send them, prefixes that are computed once, and nothing lost."""

import asyncio
import re
import subprocess
import sys
import time

import httpx2
import pytest
import torch
from typer.testing import CliRunner

from tests.support.servers import Served, engine_of, subprocess_serving
from tests.support.small_runs import save_model
from treepo.cli import app
from treepo.engines import Sampling
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError, EngineError
from treepo.models import causal_lm
from treepo.sampler import Sampler, SamplerSettings
from treepo.serve.app import load_weights
from treepo.serve.prefixes import Prefixes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights and a context of 128 tokens."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder):
    with Served(folder) as server:
        yield server


def ask(server, path, body=None, method="POST", **more):
    return httpx2.request(method, server.url + path, json=body, timeout=30, **more)


# Schemas --------------------------------------------------------------------------------------------------------------


def test_all_dialects_give_the_same_segment_in_their_own_form(served):
    params = {"max_tokens": 5, "seed": 7, "temperature": 0.8, "top_k": 30}
    one = ask(served, "/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": params | {"logprobs": 0}})
    two = ask(
        served, "/v1/completions", {"model": "tiny", "prompt": [1, 2], "logprobs": 1, "return_token_ids": True} | params
    )
    theirs = {"max_new_tokens": 5, "sampling_seed": 7, "temperature": 0.8, "top_k": 30}
    three = ask(served, "/generate", {"input_ids": [1, 2], "return_logprob": True, "sampling_params": theirs})
    assert {reply.status_code for reply in (one, two, three)} == {200}

    (choice,) = one.json()["choices"]
    assert one.json().keys() >= {"request_id", "choices", "prompt_logprobs", "kv_transfer_params"}
    assert choice.keys() >= {"index", "logprobs", "finish_reason", "token_ids"} and choice["finish_reason"] == "length"
    tokens, logprobs = choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [f"token_id:{token}" for token in tokens]

    (choice,) = two.json()["choices"]
    assert two.json().keys() >= {"id", "object", "created", "model", "choices", "usage"}
    assert choice.keys() >= {
        "index",
        "text",
        "logprobs",
        "finish_reason",
        "stop_reason",
        "token_ids",
        "prompt_token_ids",
    }
    assert choice["logprobs"].keys() == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert (choice["token_ids"], choice["logprobs"]["token_logprobs"]) == (tokens, logprobs)
    assert two.json()["usage"]["total_tokens"] == 7

    meta = three.json()["meta_info"]
    assert three.json()["output_ids"] == tokens and three.json()["text"] == choice["text"]
    assert meta["output_token_logprobs"] == [[lp, token, None] for lp, token in zip(logprobs, tokens, strict=True)]
    assert meta["finish_reason"] == {"type": "length", "length": 5} and meta["completion_tokens"] == 5


def test_a_stop_id_ends_a_segment_and_is_named(served):
    free = ask(served, "/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 8, "sampling_seed": 3}})
    stop = free.json()["output_ids"][4]
    body = {"max_new_tokens": 8, "sampling_seed": 3, "stop_token_ids": [stop]}
    reply = ask(served, "/generate", {"input_ids": [1, 2], "sampling_params": body}).json()
    assert reply["output_ids"] == free.json()["output_ids"][:5]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    body = {"prompt": [1, 2], "max_tokens": 8, "seed": 3, "stop_token_ids": [stop], "ignore_eos": True}
    (choice,) = ask(served, "/v1/completions", body).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", stop, None)


def test_a_request_without_a_seed_draws_its_own(served):
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 20}}
    replies = [ask(served, "/inference/v1/generate", body).json()["choices"][0]["token_ids"] for _ in range(2)]
    assert replies[0] != replies[1]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": [1], "n": 2}, r"n=2 is not supported"),
        ("/v1/completions", {"prompt": [[1], [2]]}, "prompt must be a list of token ids, of one request"),
        ("/v1/completions", {"prompt": [1], "max_tokens": 128}, "maximum context length is 128 tokens"),
        ("/v1/completions", {"prompt": [1], "stop": ["x"]}, r"stop=\['x'\] is not supported"),
        ("/v1/completions", {"prompt": [1], "temprature": 1}, "temprature: unknown here"),
        ("/v1/completions", {"prompt": [1], "temperature": -1}, "temperature: Input should be greater than or equal"),
        ("/v1/completions", {"prompt": [1000]}, "Token id 1000 is out of vocabulary"),
        ("/v1/completions", {"prompt": [1], "max_tokens": 0}, "max_tokens must be at least 1"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"seed": 1 << 70}}, "64-bit integer"),
        ("/inference/v1/generate", {"token_ids": []}, "token_ids must be a list"),
        ("/generate", {"input_ids": [1], "sampling_params": {"min_p": 0.1}}, "min_p=0.1 is not supported"),
        ("/update_weights_from_disk", {}, "model_path must be a folder"),
    ],
)
def test_what_is_asked_for_and_not_done_is_refused_as_the_imitated_server_does(served, path, body, message):
    reply = ask(served, path, body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error.keys() == ({"message"} if path == "/generate" else {"message", "type", "param", "code"})
    assert re.search(message, error["message"]), error


def test_a_body_that_is_no_json_object_is_refused(served):
    for content in (b"{", b"[1]"):
        assert httpx2.post(served.url + "/generate", content=content).status_code == 400


def test_what_the_server_is_can_be_asked(served):
    (model,) = ask(served, "/v1/models", method="GET").json()["data"]
    assert model["max_model_len"] == 128 and model["id"] == "tiny"
    assert ask(served, "/health", method="GET").status_code == 200
    for path in ("/model_info", "/get_model_info"):
        assert ask(served, path, method="GET").json()["is_generation"] is True
    assert "/generate" in ask(served, "/openapi.json", method="GET").json()["paths"]


def test_text_is_taken_where_it_is_the_rule(served):
    (choice,) = ask(served, "/v1/completions", {"prompt": "ab", "max_tokens": 3, "ignore_eos": True}).json()["choices"]
    assert len(choice["prompt_token_ids"]) == 2 and len(choice["token_ids"]) == 3
    assert ask(served, "/generate", {"text": "ab"}).json()["meta_info"]["prompt_tokens"] == 2


def test_only_who_has_the_key_is_answered(folder):
    with Served(folder, api_key="secret") as server:
        assert ask(server, "/v1/models", method="GET").status_code == 401
        assert ask(server, "/update_weights_from_disk", {}).json() == {"error": "Unauthorized"}
        key = {"Authorization": "Bearer secret"}
        assert ask(server, "/v1/models", method="GET", headers=key).status_code == 200
        assert ask(server, "/health", method="GET").status_code == 200


def test_256_branches_at_once_lose_nothing(folder, served):
    """Trees through the server equal the local engine's, and its steps are shared by many rows."""
    policy = causal_lm.load(str(folder))
    shape = SamplerSettings(width=32, segment_tokens=8, max_depth=5)
    prompts = [(f"q{i}", [3 + i, 4, 5 + i]) for i in range(8)]
    engine = engine_of(policy, folder / "weights", served)
    before = served.engine.stats.steps

    async def grow():
        await engine.start()
        trees = await Sampler(engine, shape, str, {0}).grow_all(prompts, 1)
        await engine.close()
        return trees

    remote = asyncio.run(grow())
    steps = served.engine.stats.steps - before
    local = Sampler(LocalEngine(policy), shape, str, {0}).sample(prompts, 1)
    assert [[n.tokens for n in tree.nodes] for tree in remote] == [[n.tokens for n in tree.nodes] for tree in local]
    assert [len(tree.leaves()) for tree in remote] == [32] * 8
    assert served.prefixes.running == 0
    assert sum(tree.unique_tokens for tree in remote) > 8 * steps, "rows are decoded together"


# Life -----------------------------------------------------------------------------------------------------------------


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_whose_client_goes_away_is_cancelled(folder):
    with Served(folder, slots=1) as server:
        body = {"token_ids": [1], "sampling_params": {"max_tokens": 127, "ignore_eos": True}}

        async def leave():
            async with httpx2.AsyncClient(base_url=server.url) as client:
                calls = [asyncio.ensure_future(client.post("/inference/v1/generate", json=body)) for _ in range(12)]
                while server.prefixes.running < 12:
                    await asyncio.sleep(0.001)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)

        asyncio.run(leave())
        wait_until(lambda: server.prefixes.running == 0)
        assert server.engine.stats.decoded_tokens < 12 * 127 / 2
        assert ask(server, "/inference/v1/generate", body).status_code == 200


def test_new_weights_wait_for_requests_under_way_and_later_requests_for_them(folder, tmp_path):
    changed = causal_lm.load(str(folder))
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    changed.save_pretrained(tmp_path / "new")
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 100, "sampling_seed": 1, "ignore_eos": True}}
    with Served(folder) as server:

        async def all_at_once():
            async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
                early = asyncio.ensure_future(client.post("/generate", json=body))
                while not server.prefixes.running:
                    await asyncio.sleep(0.001)
                new = {"model_path": str(tmp_path / "new"), "weight_version": "v2"}
                update = asyncio.ensure_future(client.post("/update_weights_from_disk", json=new))
                while server.count("/update_weights_from_disk") == 0:
                    await asyncio.sleep(0.001)
                late = asyncio.ensure_future(client.post("/generate", json=body))
                return [reply.json() for reply in await asyncio.gather(early, update, late)]

        early, update, late = asyncio.run(all_at_once())
        assert update["success"] is True
        assert [reply["meta_info"]["weight_version"] for reply in (early, late)] == ["default", "v2"]
        assert early["output_ids"] != late["output_ids"] and late["meta_info"]["cached_tokens"] == 0
        assert ask(server, "/get_model_info", method="GET").json()["weight_version"] == "v2"
        for other in (tmp_path / "none", tmp_path):
            reply = ask(server, "/update_weights_from_disk", {"model_path": str(other)})
            assert reply.status_code == 400 and reply.json()["success"] is False
        assert ask(server, "/generate", body).json()["output_ids"] == late["output_ids"]


def test_weights_of_another_model_change_nothing(folder, tmp_path):
    model = causal_lm.load(str(folder))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = save_model(tmp_path / "other", family="qwen3")
    with pytest.raises(ConfigError, match="holds another model"):
        load_weights(model, other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_weights(model, folder)


def test_tied_weights_need_be_stored_only_once(tmp_path):
    folder = save_model(tmp_path / "tied", tie_word_embeddings=True)
    model = causal_lm.load(str(folder))
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    load_weights(model, folder)
    fresh = causal_lm.load(str(folder))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_slots_and_context_are_the_engines(folder):
    engine = LocalEngine(causal_lm.load(str(folder)), LocalSettings(slots=2, max_tokens=16))
    with pytest.raises(EngineError, match="exceed 16"):
        asyncio.run(Prefixes(engine, 10).generate([1] * 12, 6, 1, Sampling(), frozenset()))


@pytest.mark.slow
def test_the_command_serves_until_it_is_asked_to_stop_and_says_what_is_amiss(folder):
    with subprocess_serving(folder, "--slots", "2", "--max-tokens", "64") as (process, url):
        reply = httpx2.post(f"{url}/generate", json={"input_ids": [1], "sampling_params": {"max_new_tokens": 4}})
        assert len(reply.json()["output_ids"]) == 4
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 64
        taken = subprocess.run(
            [
                sys.executable,
                "-c",
                "from treepo.cli import main; main()",
                "serve",
                folder,
                "--port",
                url.split(":")[-1],
            ],
            capture_output=True,
            text=True,
        )
        assert taken.returncode == 2 and "cannot listen on 127.0.0.1" in taken.stderr
        process.terminate()
        assert process.wait(30) in (0, -15)


def test_the_commands_help_says_how_to_use_it():
    text = " ".join(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output.split())
    for part in ("--memory-gib", "--api-key-env", "engine.urls=[http://127.0.0.1:8000]", "replies are token ids"):
        assert part in text
