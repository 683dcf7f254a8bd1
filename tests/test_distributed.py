"""Two processes make the run that one makes: whole trees on each, one gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.servers import Served
from tests.support.small_runs import small_config, write_config
from treepo.distributed import Processes
from treepo.models.causal_lm import create
from treepo.run.folder import read_metrics
from treepo.tree import Stop, read_trees

COMMON = (
    *("trainer.steps=3", "trainer.mini_batches=2", "trainer.save_trees_every=1", "trainer.eval_every=3"),
    *("trainer.dynamic_sampling.oversample=1.5", "loss.kl=0.1", "advantage.kind=reinforce_pp"),
)


# Each process leaves a file: lines that two of them print at once may be mixed.
MAIN = """
import os
from pathlib import Path

import torch

from treepo.cli import main

try:
    main()
finally:
    name = f"connected-{os.environ.get('RANK', '0')}"
    Path(__file__).with_name(name).write_text(str(torch.distributed.is_initialized()))
"""


def start(folder: Path, processes: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    cli = folder / "main.py"
    cli.write_text(MAIN)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), cli, "train", write_config(folder), *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("adapter", ["null", "{rank: 4}"], ids=["all weights", "an adapter"])
def test_two_processes_equal_one(tmp_path: Path, adapter: str) -> None:
    runs = {}
    for processes in (1, 2):
        done = start(tmp_path / str(processes), processes, *COMMON, f"model.lora={adapter}")
        assert done.returncode == 0, done.stderr
        connected = [file.read_text() for file in (tmp_path / str(processes)).glob("connected-*")]
        assert connected == ["False"] * processes, "a process may abort when Python ends"
        runs[processes] = tmp_path / str(processes) / "run"
        assert all(done.stdout.count(said) == 1 for said in ("held out after step 3", "learning curve:")), done.stdout
    assert {p.name for p in runs[1].iterdir()} == {p.name for p in runs[2].iterdir()}
    for step in (1, 2, 3):
        one, two = (list(read_trees(run / "trees" / f"step-00000{step}.jsonl.gz")) for run in runs.values())
        assert [r.problem_id for r in one] == [r.problem_id for r in two]
        assert [[n.tokens for n in r.tree.nodes] for r in one] == [[n.tokens for n in r.tree.nodes] for r in two]
    one, two = (read_metrics(run / "metrics.jsonl") for run in runs.values())
    for a, b in zip(one, two, strict=True):
        for metrics in (a, b):
            for name in [name for name in metrics if name.startswith("seconds/")]:
                del metrics[name]
        assert a.keys() == b.keys()
        exact = [name for name in a if name.startswith(("eval/", "stop/"))]
        assert all(a.pop(name) == b.pop(name) for name in exact)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    name = "model.safetensors" if adapter == "null" else "adapter_model.safetensors"
    weights = [load_file(run / "checkpoints" / "step-000003" / name) for run in runs.values()]
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


@pytest.mark.slow
def test_two_processes_share_a_server_and_one_of_them_sends_the_weights(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    tokenizer = config.task.tokenizer()  # type: ignore[union-attr]
    create(config.model.create, tokenizer, 3).save_pretrained(tmp_path / "model")  # type: ignore[arg-type]
    tokenizer.save_pretrained(tmp_path / "model")
    model = (f"model.path={tmp_path / 'model'}", "model.create=null", "warmup=null", "trainer.dynamic_sampling=null")
    with Served(tmp_path / "model") as server:
        engine = ("engine.kind=server", f"engine.urls=[{server.url}]", "trainer.save_trees_every=1")
        done = start(tmp_path / "both", 2, *model, *engine)
        assert done.returncode == 0, done.stderr
        assert server.count("/update_weights_from_disk") == 3
    for step in (1, 2):
        rollouts = list(read_trees(tmp_path / "both" / "run" / "trees" / f"step-00000{step}.jsonl.gz"))
        assert {node.version for r in rollouts for node in r.tree.nodes[1:]} == {step - 1}
        assert not any(node.stop is Stop.ERROR for r in rollouts for node in r.tree.nodes)
