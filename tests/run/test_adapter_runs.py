"""Runs that train an adapter: nothing else changes, they resume bit for bit, and their folders can be used again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support.adapters import logits_of
from tests.support.servers import Served
from tests.support.small_runs import begin, small_config
from treepo.cli import app
from treepo.errors import ConfigError
from treepo.models import causal_lm, lora
from treepo.run.build import training
from treepo.run.folder import Metrics, read_metrics
from treepo.run.trainer import Observer, Trainer
from treepo.tree import read_trees

RUN = ("model.lora={rank: 4, alpha: 8}", "trainer.lr=0.03", "warmup.steps=60")
BUSY = (
    *("trainer.steps=4", "trainer.mini_batches=2", "trainer.dynamic_sampling.oversample=1.5"),
    *("trainer.save_every=3", "trainer.save_trees_every=1", "trainer.eval_every=2", "loss.kl=0.05"),
)
LOAD = "/v1/load_lora_adapter"


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
    with training(small_config(folder, *RUN, *overrides), resume=resume, observer=observer) as trainer:
        observer.trainer = trainer
        trainer.run()
    return trainer


def files(run: Path) -> dict[str, Any]:
    """All that a run leaves, without times and places."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name == "metrics.jsonl":
            found[name] = [{k: v for k, v in m.items() if not k.startswith("seconds/")} for m in read_metrics(path)]
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
    steps = [m for m in read_metrics(run / "metrics.jsonl") if "train/grad_norm" in m]
    assert all(m["train/grad_norm"] > 0 for m in steps) and steps[-1]["kl/reference"] > 1e-4


def test_a_run_that_is_stopped_and_resumed_ends_as_an_undisturbed_one(undisturbed: Trainer, tmp_path: Path) -> None:
    trained(tmp_path, *BUSY, stop=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    assert checkpoint.is_dir()
    (tmp_path / "mutant").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "mutant" / "run")
    trained(tmp_path, *BUSY, resume=True)
    assert files(tmp_path / "run") == files(undisturbed.folder.path)
    # A mutant: the optimizer's moments are lost.
    moments = tmp_path / "mutant" / "run" / "checkpoints" / "step-000002" / "optimizer.safetensors"
    kept = load_file(moments)
    save_file({name: value if value.dim() == 0 else torch.zeros_like(value) for name, value in kept.items()}, moments)
    trained(tmp_path / "mutant", *BUSY, resume=True)
    last = "checkpoints/step-000004/" + lora.WEIGHTS
    assert files(tmp_path / "mutant" / "run")[last] != files(undisturbed.folder.path)[last]


def test_the_penalty_compares_with_the_model_without_its_adapter(undisturbed: Trainer) -> None:
    reference = undisturbed.learner.reference
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
        evaluation = read_metrics(run / "metrics.jsonl")[-1]
        for words in (["eval", str(run)], ["eval", str(run), "model.lora=null"]):
            found = CliRunner().invoke(app, [*words, "--json"])
            assert found.exit_code == 0, found.output
            assert json.loads(found.output).items() <= evaluation.items()
        sampled = CliRunner().invoke(app, ["sample", str(run), "--model", str(latest), "--problems", "1"])
        assert sampled.exit_code == 0, sampled.output
        on = ("model.create=null", "warmup=null", f"model.path={latest}", "trainer.steps=1", "loss.kl=0.05")
        more = trained(tmp_path / "more", *on)
        assert lora.settings_of(more.actor.model).base_model_name_or_path == str(run / "base")
        assert more.learner.reference is not None
        with more.learner.reference() as model:
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
    (step,) = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/grad_norm" in m]
    assert step["train/grad_norm"] > 0
    with pytest.raises(ConfigError, match=r"or train an adapter \(model\.lora\)"):
        begin(small_config(tmp_path / "run", *start, "model.dtype=bfloat16", f"out={tmp_path / 'other'}"))


def test_training_through_a_server_is_training_on_the_local_engine(undisturbed: Trainer, tmp_path: Path) -> None:
    base = undisturbed.folder.path / "base"
    start = ("model.create=null", "warmup=null", f"model.path={base}", "trainer.save_trees_every=1", "loss.kl=0.05")
    trained(tmp_path / "local", *start)
    with Served(base) as server:
        trained(tmp_path / "remote", *start, "engine.kind=server", f"engine.urls=[{server.url}]")
        sent = [Path(name).name for name in server.loaded(LOAD, "lora_path")]
        assert sent == ["version-000000", "version-000001", "version-000002"], "at the start and after each step"
    runs = [tmp_path / name / "run" for name in ("local", "remote")]
    for step in (1, 2):
        one, two = (list(read_trees(path / "trees" / f"step-00000{step}.jsonl.gz")) for path in runs)
        assert [[n.tokens for n in r.tree.nodes] for r in one] == [[n.tokens for n in r.tree.nodes] for r in two]
    for a, b in zip(*(read_metrics(path / "metrics.jsonl") for path in runs), strict=True):
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)
