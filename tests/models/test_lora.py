"""LoRA adapters: exact gradients, bit-identical resumes, folders that others read, servers that are sent no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from starlette.responses import JSONResponse
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from tests.engines.remote.test_engine import GENERATE, grow, intact, run, worst_error
from tests.support.packed_oracle import Case, flat_case, worst
from tests.support.servers import Served, engine_of
from tests.support.small_runs import save_model, small_config
from treepo.cli import app
from treepo.engines.local.engine import LocalEngine
from treepo.engines.weight_check import probe_tree
from treepo.engines.weight_files import save
from treepo.errors import ConfigError, EngineError
from treepo.learner.gradient import backward_row
from treepo.models import causal_lm, lora
from treepo.models.lora import LoraSettings
from treepo.run.folder import Metrics, read_metrics
from treepo.run.trainer import Observer, Trainer
from treepo.sampler import Sampler, SamplerSettings
from treepo.serve.app import replace_adapter
from treepo.tree import Tree, read_trees

SMALL = LoraSettings(rank=4, alpha=8)
RUN = ("model.lora={rank: 4, alpha: 8}", "trainer.lr=0.03", "warmup.steps=60")
BUSY = (
    *("trainer.steps=4", "trainer.mini_batches=2", "trainer.dynamic_sampling.oversample=1.5"),
    *("trainer.save_every=3", "trainer.save_trees_every=1", "trainer.eval_every=2", "loss.kl=0.05"),
)


def stir(model: PreTrainedModel, by: float = 0.1, seed: int = 1) -> None:
    """Move all of the adapter, of which one half is zeros at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([probe_tree(model).prompt])
    with torch.no_grad():
        states = causal_lm.hidden(model, ids, torch.arange(ids.shape[1])[None], causal_lm.Causal())
        return causal_lm.logits(model, states)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(folder: Path) -> PreTrainedModel:
    """That model with an adapter that does something."""
    model = causal_lm.load(str(folder))
    lora.attach(model, SMALL, str(folder), seed=0)
    stir(model)
    return model


# The adapter itself ---------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_yet_and_is_a_function_of_its_seed(folder: Path) -> None:
    models = [causal_lm.load(str(folder)) for _ in range(3)]
    before = logits_of(models[0])
    for model, seed in zip(models, (1, 1, 2), strict=True):
        lora.attach(model, SMALL, str(folder), seed)
    assert torch.equal(logits_of(models[0]), before)
    names = [lora.name_of(model) for model in models]
    assert names[0] == names[1] != names[2]
    trained = {name for name, parameter in models[0].named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in models[0].named_parameters() if "lora_" in name}
    kinds = {name.split(".lora_")[0].split(".")[-1] for name in trained}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_without_it_the_model_is_exactly_what_it_was(policy: PreTrainedModel, folder: Path) -> None:
    with_it, before = logits_of(policy), logits_of(causal_lm.load(str(folder)))
    with lora.without(policy) as base:
        assert torch.equal(logits_of(base), before)
    assert torch.equal(logits_of(policy), with_it) and not torch.allclose(with_it, before, atol=1e-2)
    assert any(parameter.requires_grad for parameter in policy.parameters())
    lora.detach(policy)
    assert torch.equal(logits_of(policy), before) and not lora.adapted(policy)
    assert policy.state_dict().keys() == causal_lm.load(str(folder)).state_dict().keys()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["v_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("max_tokens", [12, 10**6])
def test_the_packed_gradient_of_an_adapter_is_the_flat_one(
    targets: Any, max_tokens: int, random_tree: Callable[..., Tree]
) -> None:
    case = flat_case("qwen2", torch.float64, random_tree)
    for model in (case.model, case.plain):
        lora.attach(model, LoraSettings(rank=3, alpha=6, targets=targets), "none", seed=0)
        stir(model, 0.3)
    response = [rows[-len(x) :] for rows, x in zip(case.rows, case.flat_logprob, strict=True)]
    through = torch.tensor(np.bincount(np.concatenate(response), minlength=len(case.batch)))  # leaves of each row
    value = torch.zeros((), dtype=torch.float64)

    def loss(rows: np.ndarray, logprob: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        nonlocal value
        part = (through[rows] * logprob.exp()).sum()
        value = value + part.detach()
        return part

    backward_row(case.model, case.batch, loss, max_tokens=max_tokens)
    flat = flat_value(case, response)
    flat.backward()  # type: ignore[no-untyped-call]
    assert value.item() == pytest.approx(flat.item(), rel=1e-12)
    found, expected = (
        {n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (case.model, case.plain)
    )
    assert found.keys() == expected.keys() and len(found) > 0
    for name, gradient in expected.items():
        assert worst(found[name], gradient) < 1e-9, name
    assert all(p.grad is None for p in case.model.parameters() if not p.requires_grad)
    # A mutant: without the adapter the value is another.
    with lora.without(case.plain), torch.no_grad():
        assert abs(flat_value(case, response).item() - flat.item()) > 1e-3


def flat_value(case: Case, response: list[list[int]]) -> torch.Tensor:
    """The sum of the probabilities of all tokens of all leaves, one plain row each."""
    value = torch.zeros((), dtype=torch.float64)
    for path, rows in zip(case.rows, response, strict=True):
        ids = torch.tensor(case.batch.token_ids[path])
        found = case.plain(input_ids=ids[None], use_cache=False).logits[0].softmax(-1)
        value = value + found[len(path) - len(rows) - 1 : -1].gather(-1, ids[-len(rows) :, None]).sum()
    return value


def test_the_local_engine_decodes_with_the_adapter(policy: PreTrainedModel) -> None:
    shape = SamplerSettings(width=6, segment_tokens=5, max_depth=4)
    trees = Sampler(LocalEngine(policy), shape, str, {0}).sample([("a", [5, 6, 7]), ("b", [8, 9])], 0)
    assert max(worst_error(policy, tree) for tree in trees) < 1e-4
    with lora.without(policy) as base:
        assert max(worst_error(base, tree) for tree in trees) > 0.05, "the test wants an adapter that shows"


@pytest.mark.parametrize("model", ["merged", "beside"])
def test_a_saved_adapter_is_the_same_policy_to_us_and_to_transformers(
    model: str, policy: PreTrainedModel, tmp_path: Path
) -> None:
    saved = save(policy, tmp_path, 1)
    assert sum(file.stat().st_size for file in saved.glob("*.safetensors")) < 30_000
    loaded = causal_lm.load(str(saved), adapter=SMALL if model == "beside" else None)
    assert lora.adapted(loaded) is (model == "beside")
    torch.testing.assert_close(logits_of(loaded), logits_of(policy), rtol=0, atol=0 if model == "beside" else 1e-5)
    assert all(p.requires_grad == (model == "merged" or "lora_" in n) for n, p in loaded.named_parameters())
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([probe_tree(policy).prompt])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, logits_of(policy), rtol=0, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(
    policy: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    saved = save(policy, tmp_path, 1)
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: the adapter in .* has 4, not 16: .* model\.lora=null"):
        causal_lm.load(str(saved), adapter=LoraSettings(alpha=8))
    shape = AutoConfig.from_pretrained(folder, intermediate_size=64)
    wider = causal_lm.prepare(AutoModelForCausalLM.from_config(shape))
    before = logits_of(wider)
    for wrong, why in ((tmp_path / "none", "holds no adapter_config.json"), (saved, "is for another model")):
        with pytest.raises(ConfigError, match=why):
            lora.restore(wider, wrong)
        assert not lora.adapted(wider) and torch.equal(logits_of(wider), before)
    (saved / lora.WEIGHTS).write_bytes(b"half")
    with pytest.raises(ConfigError, match="cannot be read"):
        lora.restore(causal_lm.load(str(folder)), saved)


@pytest.mark.parametrize("untied", [False, True], ids=["as it is", "untied"])
@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "adapter"])
def test_whoever_may_read_the_folder_may_read_the_weights(
    policy: PreTrainedModel, tmp_path: Path, *, adapter: bool, untied: bool
) -> None:
    if not adapter:
        lora.detach(policy)
    policy.config.tie_word_embeddings = True
    files = list(save(policy, tmp_path, 1, untied=untied).iterdir())
    assert any(file.suffix == ".safetensors" for file in files)
    assert len({file.stat().st_mode for file in files}) == 1


def test_targets_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    model = causal_lm.load(str(folder))
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: .*query"):
        lora.attach(model, LoraSettings(targets=["query"]), str(folder), 0)
    assert not lora.adapted(model)


def test_without_peft_the_command_that_installs_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo.models.lora.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'treepo\[lora\]'"):
        lora.attach(causal_lm.load(str(folder)), SMALL, str(folder), 0)


# Whole runs -----------------------------------------------------------------------------------------------------------


class Stopping(Observer):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.trainer = step, None

    def stepped(self, metrics: Metrics) -> None:
        if metrics["step"] == self.step and self.trainer is not None:
            self.trainer.stop()


def trained(folder: Path, *overrides: str, resume: bool = False, stop: int = 0) -> Trainer:
    folder.mkdir(exist_ok=True)
    observer = Stopping(stop)
    with Trainer(small_config(folder, *RUN, *overrides), resume=resume, observer=observer) as trainer:
        observer.trainer = trainer
        trainer.run()
    return trainer


def files(run: Path) -> dict[str, Any]:
    """All that a run leaves, without times and places."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name == "metrics.jsonl":
            found[name] = [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(path)]
        elif path.name == "state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.suffix in (".safetensors", ".gz"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trained(tmp_path_factory.mktemp("undisturbed"), *BUSY)


def test_a_run_trains_the_adapter_and_nothing_else(undisturbed: Trainer) -> None:
    run, model = undisturbed.folder.path, undisturbed.actor.model
    base, now = load_file(run / "base" / "model.safetensors"), model.state_dict()
    for name, value in base.items():
        own = (
            name if name in now else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        assert torch.equal(now[own], value), name
    first, last = (load_file(run / "checkpoints" / f"step-00000{n}" / lora.WEIGHTS) for n in (3, 4))
    assert all(not torch.equal(first[name], last[name]) for name in first)
    kept = load_file(run / "checkpoints" / "step-000004" / "optimizer.safetensors")
    assert kept and all(".lora_" in name for name in kept)
    steps = [m for m in read_metrics(run / "metrics.jsonl") if "grad_norm" in m]
    assert all(m["grad_norm"] > 0 for m in steps) and steps[-1]["kl/reference"] > 1e-4


def test_a_run_that_is_stopped_and_resumed_ends_as_if_nothing_had_been(undisturbed: Trainer, tmp_path: Path) -> None:
    trained(tmp_path, *BUSY, stop=2)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    trained(tmp_path, *BUSY, resume=True)
    assert files(tmp_path / "run") == files(undisturbed.folder.path)


def test_the_penalty_compares_with_the_model_without_its_adapter(undisturbed: Trainer) -> None:
    reference = undisturbed.updater.reference
    base = causal_lm.load(str(undisturbed.folder.path / "base"))
    assert reference is not None
    with reference() as model:
        assert torch.equal(logits_of(model), logits_of(base))
    assert not torch.allclose(logits_of(undisturbed.actor.model), logits_of(base), atol=1e-3)


def test_checkpoints_are_sampled_from_evaluated_and_trained_on(undisturbed: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(undisturbed.folder.path, run)
    shutil.move(undisturbed.folder.path / "base", tmp_path / "hidden")  # where the checkpoints say that it is
    try:
        latest = run / "checkpoints" / "step-000004"
        expected = logits_of(undisturbed.actor.model)
        torch.testing.assert_close(logits_of(causal_lm.load(str(latest))), expected, rtol=0, atol=1e-5)
        evaluation = read_metrics(run / "metrics.jsonl")[-1]["evaluation"]
        for words in (["eval", str(run)], ["eval", str(run), "model.lora=null"]):
            found = CliRunner().invoke(app, [*words, "--json"])
            assert found.exit_code == 0, found.output
            assert json.loads(found.output)["pass_at_k"] == evaluation["pass_at_k"]
        sampled = CliRunner().invoke(app, ["sample", str(run), "--model", str(latest), "--problems", "1"])
        assert sampled.exit_code == 0, sampled.output
        on = ("model.create=null", "warmup=null", f"model.path={latest}", "trainer.steps=1", "loss.kl=0.05")
        more = trained(tmp_path / "more", *on)
        assert lora.settings_of(more.actor.model).base_model_name_or_path == str(run / "base")
        assert more.updater.reference is not None
        with more.updater.reference() as model:
            torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)
        whole = trained(tmp_path / "whole", *on, "model.lora=null", "trainer.lr=1e-3")
        assert not lora.adapted(whole.actor.model)
        assert (whole.folder.checkpoints / "step-000001" / "model.safetensors").is_file()
    finally:
        shutil.move(tmp_path / "hidden", undisturbed.folder.path / "base")


def test_the_base_may_be_in_bfloat16_where_the_adapter_is_not(undisturbed: Trainer, tmp_path: Path) -> None:
    start = ("model.create=null", "warmup=null", f"model.path={undisturbed.folder.path / 'base'}")
    trainer = trained(
        tmp_path, *start, "model.dtype=bfloat16", "trainer.steps=1", "trainer.gradient_checkpointing=true"
    )
    dtypes = {name: p.dtype for name, p in trainer.actor.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    (step,) = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in m]
    assert step["grad_norm"] > 0
    with pytest.raises(ConfigError, match=r"so does model\.lora"):
        Trainer(small_config(tmp_path / "run", *start, "model.dtype=bfloat16", f"out={tmp_path / 'other'}"))


# Servers --------------------------------------------------------------------------------------------------------------

LOAD = "/v1/load_lora_adapter"


@pytest.mark.parametrize("dialect", ["auto", "completions", "sglang"])
def test_servers_are_sent_the_adapter_alone_and_decode_with_it(
    folder: Path, policy: PreTrainedModel, tmp_path: Path, dialect: str
) -> None:
    trees: list[list[Tree]] = []
    with Served(folder) as one, Served(folder) as two:
        engine = engine_of(policy, tmp_path / "weights", one, two, dialect=dialect)

        async def steps() -> None:
            for version in (1, 2):
                stir(policy, seed=version)
                await engine.load_weights(version)
                trees.append(await grow(engine)())
                assert max(worst_error(policy, tree) for tree in trees[-1]) < 1e-4

        run(engine, steps)
        paths = [path for path, _ in one.asked]
        load = "/load_lora_adapter" if dialect == "sglang" else LOAD
        assert paths.count(load) == 2 and paths.count(load.replace("/load", "/unload")) == 3
        assert "/update_weights_from_disk" not in paths
        assert one.prefixes.adapter == two.prefixes.adapter == lora.name_of(policy)
    assert all(intact(found) for found in trees)
    assert {node.version for tree in trees[1] for node in tree.nodes[1:]} == {2}
    assert max(worst_error(policy, tree) for tree in trees[0]) > 0.01, "the test wants updates that show"
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
            server.prefixes.adapter = None  # as a process that starts anew
            lora.detach(server.model)

    with Served(folder, intercept=restart) as server:
        engine = engine_of(policy, tmp_path, server, dialect=dialect)

        async def go_on() -> list[Tree]:
            await engine.load_weights(1)
            return await grow(engine, retries=0)()

        trees = run(engine, go_on)
        assert server.count(LOAD) + server.count("/load_lora_adapter") == 2
    assert intact(trees) and max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_a_fresh_engine_sends_the_adapter_to_a_server_that_has_the_base(
    folder: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    with Served(folder) as server:
        engine = engine_of(policy, tmp_path, server)
        trees = run(engine, grow(engine))
    assert max(worst_error(policy, tree) for tree in trees) < 1e-4


def test_of_processes_that_share_a_server_the_others_only_name_the_adapter(
    folder: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    with Served(folder) as server:
        first, second = engine_of(policy, tmp_path, server), engine_of(policy, tmp_path, server, sends=False)

        async def both() -> list[Tree]:
            await first.load_weights(1)
            await second.load_weights(1)
            trees = await grow(second)()
            await second.close()
            return trees

        trees = run(first, both)
        assert server.count(LOAD) == 1
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


def test_training_through_a_server_is_training_on_the_local_engine(undisturbed: Trainer, tmp_path: Path) -> None:
    base = undisturbed.folder.path / "base"
    start = ("model.create=null", "warmup=null", f"model.path={base}", "trainer.save_trees_every=1", "loss.kl=0.05")
    trained(tmp_path / "local", *start)
    with Served(base) as server:
        trained(tmp_path / "remote", *start, "engine.kind=server", f"engine.urls=[{server.url}]")
        assert server.count(LOAD) == 3, "at the start and after each step"
    runs = [tmp_path / name / "run" for name in ("local", "remote")]
    for step in (1, 2):
        one, two = (list(read_trees(path / "trees" / f"step-00000{step}.jsonl.gz")) for path in runs)
        assert [[n.tokens for n in r.tree.nodes] for r in one] == [[n.tokens for n in r.tree.nodes] for r in two]
    for a, b in zip(*(read_metrics(path / "metrics.jsonl") for path in runs), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
