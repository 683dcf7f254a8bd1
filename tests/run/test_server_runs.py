"""Whole runs that decode on servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.servers import Served
from tests.support.small_runs import small_config
from treepo.engines.remote.protocols import (
    FromDisk,
)
from treepo.models.causal_lm import create
from treepo.run.build import training
from treepo.run.folder import read_metrics
from treepo.tree import read_trees


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
            with training(settings) as trainer:
                trainer.run()
        sent = [Path(name).name for name in server.loaded(FromDisk.path, "model_path")]
        assert sent == ["version-000000", "version-000001", "version-000002"], "at the start and after each step"
    runs = [tmp_path / "local" / "run", tmp_path / "run"]
    for step in (1, 2):
        one, two = (list(read_trees(run / "trees" / f"step-00000{step}.jsonl.gz")) for run in runs)
        assert [[n.tokens for n in r.tree.nodes] for r in one] == [[n.tokens for n in r.tree.nodes] for r in two]
        assert {n.version for r in two for n in r.tree.nodes[1:]} == {step - 1}
    one, two = (read_metrics(run / "metrics.jsonl") for run in runs)
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if k.startswith("eval/")} == {
            k: v for k, v in b.items() if k.startswith("eval/")
        }
        if "train/grad_norm" in a:
            assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)


def test_a_run_ahead_trains_on_trees_that_are_one_step_old_and_sees_every_problem_once(tmp_path):
    config = small_config(tmp_path, "warmup.steps=60")
    start = tmp_path / "start"
    create(config.model.create, config.task.tokenizer(), 3).save_pretrained(start)
    config.task.tokenizer().save_pretrained(start)
    with Served(start) as server:
        ahead = ["trainer.ahead=true", "loss.rollout_cap=2.0", "trainer.steps=4", "trainer.save_trees_every=1"]
        shape = ["trainer.dynamic_sampling=null", "trainer.eval_every=2", "engine.kind=server"]
        with training(small_config(tmp_path, *ahead, *shape, f"engine.urls=[{server.url}]")) as trainer:
            trainer.run()
    run = tmp_path / "run"
    steps = [m for m in read_metrics(run / "metrics.jsonl") if "staleness/mean" in m]
    assert [m["staleness/mean"] for m in steps] == [0, 1, 1, 1] and not any(m["staleness/mixed"] for m in steps)
    keys = [r.tree.key for n in range(1, 5) for r in read_trees(run / "trees" / f"step-{n:06d}.jsonl.gz")]
    assert [int(key.split("/")[1]) for key in keys] == list(range(16))
