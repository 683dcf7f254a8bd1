"""Adapters on servers: only the adapter is sent, and no server decodes with another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from starlette.responses import JSONResponse
from transformers import PreTrainedModel

from tests.support.adapters import SMALL, logits_of, stir
from tests.support.engine_trees import follows_updates, grow, intact, run, worst_error
from tests.support.servers import GENERATE, Served, engine_of
from tests.support.small_runs import save_model
from treepo.engines.weight_files import save
from treepo.errors import EngineError
from treepo.models import causal_lm, lora
from treepo.serve.app import replace_adapter
from treepo.tree import Tree

LOAD = "/v1/load_lora_adapter"


@pytest.fixture
def policy(folder: Path) -> PreTrainedModel:
    """That model with an adapter that does something."""
    model = causal_lm.load(str(folder))
    lora.attach(model, SMALL, str(folder), seed=0)
    stir(model)
    return model


@pytest.mark.parametrize("dialect", ["auto", "completions", "sglang"])
def test_servers_get_only_the_adapter_and_decode_with_it(
    folder: Path, policy: PreTrainedModel, tmp_path: Path, dialect: str
) -> None:
    with Served(folder) as one, Served(folder) as two:
        engine = engine_of(policy, tmp_path / "weights", one, two, dialect=dialect)

        names: list[str] = []

        def move(version: int) -> None:
            stir(policy, seed=version)
            names.append(lora.name_of(policy))

        names.append(lora.name_of(policy))
        trees = run(engine, lambda: follows_updates(engine, policy, move))
        paths = {path for path, _ in one.asked}
        load = "/load_lora_adapter" if dialect == "sglang" else LOAD
        assert one.loaded(load, "lora_name") == names
        # The last adapter is unloaded, and one of the new name, which an earlier run may have left.
        assert one.loaded(load.replace("/load", "/unload"), "lora_name") == names
        assert "/update_weights_from_disk" not in paths
        assert one.prefixes.adapter == two.prefixes.adapter == lora.name_of(policy)
    assert all(intact(found) for found in trees)
    (left,) = (tmp_path / "weights").iterdir()
    assert left.name == "version-000002" and not (left / "model.safetensors").exists()


def test_a_server_that_goes_on_with_the_last_adapter_is_refused(
    folder: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    def stale(path: str, count: int) -> None:
        if path == LOAD and count == 2:
            shutil.copy(tmp_path / "version-000001" / lora.WEIGHTS, tmp_path / "version-000002" / lora.WEIGHTS)

    with Served(folder, intercept=stale) as server:
        engine = engine_of(policy, tmp_path, server)

        async def step() -> None:
            await engine.load_weights(1)
            stir(policy)
            await engine.load_weights(2)

        with pytest.raises(EngineError, match=r"version 2 of the weights: it answers as before"):
            run(engine, step)


def test_a_server_with_another_base_is_refused(policy: PreTrainedModel, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other")
    model = causal_lm.load(str(other))
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(other)
    with Served(other) as server:
        engine = engine_of(policy, tmp_path / "weights", server)
        with pytest.raises(EngineError, match="it serves another model"):
            run(engine, lambda: engine.load_weights(1))


def test_a_server_without_lora_is_told_how_to_be_started(folder: Path, policy: PreTrainedModel, tmp_path: Path) -> None:
    fixed = JSONResponse({"paths": {GENERATE: {}, "/collective_rpc": {}}})
    off = JSONResponse({"error": {"message": "LoRA is not enabled. Use --enable-lora to enable LoRA."}}, 400)
    for path, answer, why in (("/openapi.json", fixed, "cannot take adapters"), (LOAD, off, "LoRA is not enabled")):
        with Served(folder, intercept=lambda p, _, at=path, given=answer: given if p == at else None) as server:
            engine = engine_of(policy, tmp_path, server)
            with pytest.raises(EngineError, match=rf"{why}.*--enable-lora .* VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
                run(engine, lambda engine=engine: engine.load_weights(1))


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_server_that_forgets_the_adapter_gets_it_again(
    folder: Path, policy: PreTrainedModel, tmp_path: Path, dialect: str
) -> None:
    def restart(path: str, count: int) -> None:
        if path in (GENERATE, "/generate") and count == 12:
            server.prefixes.adapter = None  # as if its process had been started anew
            lora.detach(server.model)

    with Served(folder, intercept=restart) as server:
        engine = engine_of(policy, tmp_path, server, dialect=dialect)

        async def go_on() -> list[Tree]:
            await engine.load_weights(1)
            return await grow(engine, retries=0)()

        trees = run(engine, go_on)
        assert server.count(LOAD) + server.count("/load_lora_adapter") >= 2
    assert intact(trees) and max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_a_fresh_engine_sends_the_adapter_to_a_server_that_has_the_base(
    folder: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    with Served(folder) as server:
        engine = engine_of(policy, tmp_path, server)
        trees = run(engine, grow(engine))
    assert max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_of_several_processes_only_one_sends_the_adapter(folder: Path, policy: PreTrainedModel, tmp_path: Path) -> None:
    with Served(folder) as server:
        first, second = engine_of(policy, tmp_path, server), engine_of(policy, tmp_path, server, sends=False)

        async def both() -> list[Tree]:
            await first.load_weights(1)
            by_first = server.count(LOAD)
            await second.load_weights(1)
            trees = await grow(second)()
            await second.close()
            assert server.count(LOAD) == by_first > 0
            return trees

        trees = run(first, both)
    assert max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_treepo_serve_has_one_adapter_at_a_time_and_answers_for_no_other(
    folder: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    saved = save(policy, tmp_path, 1)
    with Served(folder) as server:

        def post(path: str, **body: Any) -> httpx2.Response:
            return httpx2.post(server.url + path, json=body, timeout=30)

        def tokens(model: str | None = None) -> httpx2.Response:
            params = {"max_tokens": 8, "temperature": 0, "logprobs": 0}
            return post(
                GENERATE, token_ids=[1, 2], sampling_params=params, **({} if model is None else {"model": model})
            )

        def listed() -> list[tuple[str, str | None]]:
            models = httpx2.get(server.url + "/v1/models").json()["data"]
            return [(model["id"], model["parent"]) for model in models]

        assert listed() == [("tiny", None)]
        plain = tokens().json()["choices"][0]["token_ids"]
        assert tokens("tiny").json()["choices"][0]["token_ids"] == plain
        assert tokens("a").status_code == 404 and "`a` does not exist" in tokens("a").text
        assert post(LOAD, lora_name="a", lora_path=str(tmp_path)).status_code == 400
        assert post(LOAD, lora_name="a").status_code == post("/load_lora_adapter", lora_path="x").status_code == 400
        assert post(LOAD, lora_name="a", lora_path=str(saved)).text.startswith("Success")
        assert listed() == [("tiny", None), ("a", "tiny")]
        adapted = tokens("a").json()
        assert adapted["choices"][0]["token_ids"] != plain and adapted["weight_version"] == "a"
        assert tokens().status_code == tokens("tiny").status_code == 404
        body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 8, "temperature": 0}, "lora_path": "b"}
        assert post("/generate", **body).status_code == 400
        assert post("/generate", **body | {"lora_path": "a"}).json()["output_ids"] == adapted["choices"][0]["token_ids"]
        assert post("/v1/unload_lora_adapter", lora_name="b").status_code == 404
        assert post("/unload_lora_adapter", lora_name="a").json()["success"] is True
        assert listed() == [("tiny", None)]
        assert tokens().json()["choices"][0]["token_ids"] == plain
        # Whole weights take the place of an adapter, and a load that fails leaves none.
        post(LOAD, lora_name="a", lora_path=str(saved))
        assert post("/update_weights_from_disk", model_path=str(folder)).json()["success"] is True
        assert tokens().json()["choices"][0]["token_ids"] == plain
        post(LOAD, lora_name="a", lora_path=str(saved))
        assert post(LOAD, lora_name="b", lora_path=str(tmp_path)).status_code == 400
        assert tokens("a").status_code == 404 and tokens().json()["choices"][0]["token_ids"] == plain
    model = causal_lm.load(str(folder))
    replace_adapter(model, saved)
    assert torch.equal(logits_of(model), logits_of(policy))
