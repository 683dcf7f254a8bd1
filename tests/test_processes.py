"""Two processes make the run that one makes: whole trees on each, one gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import write_config

from treepo.folder import read_metrics
from treepo.processes import Processes
from treepo.tree import read_rollouts

COMMON = (
    *("trainer.steps=3", "trainer.mini_batches=2", "trainer.save_trees_every=1", "trainer.eval_every=3"),
    *("trainer.dynamic_sampling.oversample=1.5", "loss.kl=0.1", "advantage.kind=reinforce_pp"),
)


def start(folder: Path, processes: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    cli = folder / "main.py"
    cli.write_text("from treepo.cli import main\nmain()\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), cli, "train", write_config(folder), *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    runs = {}
    for processes in (1, 2):
        done = start(tmp_path / str(processes), processes, *COMMON)
        assert done.returncode == 0, done.stderr
        runs[processes] = tmp_path / str(processes) / "run"
        assert all(done.stdout.count(said) == 1 for said in ("held out after step 3", "learning curve:")), done.stdout
    assert {p.name for p in runs[1].iterdir()} == {p.name for p in runs[2].iterdir()}
    for step in (1, 2, 3):
        one, two = (list(read_rollouts(run / "trees" / f"step-00000{step}.jsonl.gz")) for run in runs.values())
        assert [r.problem_id for r in one] == [r.problem_id for r in two]
        assert [[n.tokens for n in r.tree.nodes] for r in one] == [[n.tokens for n in r.tree.nodes] for r in two]
    one, two = (read_metrics(run / "metrics.jsonl") for run in runs.values())
    for a, b in zip(one, two, strict=True):
        for metrics in (a, b):
            metrics.pop("seconds", None)
        exact = {"evaluation", "stops"}
        assert all(a.pop(name, None) == b.pop(name, None) for name in exact)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    weights = [load_file(run / "checkpoints" / "step-000003" / "model.safetensors") for run in runs.values()]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)


def test_an_error_in_two_processes_ends_both(tmp_path: Path) -> None:
    assert start(tmp_path, 2, *COMMON, "sampler.max_depth=1000").returncode != 0
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_shares_are_disjoint_and_complete() -> None:
    items = list("abcdefg")
    shares = [Processes(rank, 3).mine(items) for rank in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert Processes().everyones(items) == items
    assert Processes().main and not Processes(1, 2).main
