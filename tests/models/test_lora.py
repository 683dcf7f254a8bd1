"""Adapters of a model: exact gradients, exact decoding, folders that others read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.adapters import SMALL, logits_of, stir
from tests.support.engine_trees import (
    worst_error,
)
from tests.support.packed_oracle import Case, flat_case, worst
from tests.support.small_runs import save_model
from treepo.engines.local.engine import LocalEngine
from treepo.engines.weight_check import probe_tree
from treepo.engines.weight_files import save
from treepo.errors import ConfigError
from treepo.learner.gradient import backward_row
from treepo.models import causal_lm, lora
from treepo.models.lora import LoraSettings
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import Tree


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
