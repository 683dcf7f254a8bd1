"""Whatever kills a run, resuming it ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.small_runs import begin, small_config, steps_of, trained, write_config
from treepo.errors import ConfigError
from treepo.run import checkpoint
from treepo.run.build import training
from treepo.run.folder import RunFolder, read_metrics

# Everything that can go wrong with a resume is on: several updates per step, replaced queries, trees, evaluations.
BUSY = (
    *("trainer.steps=5", "trainer.mini_batches=2", "trainer.dynamic_sampling.oversample=1.5"),
    *("trainer.save_every=2", "trainer.save_trees_every=1", "trainer.eval_every=2", "loss.kl=0.05"),
)


def everything(run: Path) -> dict[str, object]:
    """All that a run leaves, but for what a clock says."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or name == "config.yaml":  # the folder differs
            continue
        if name == "metrics.jsonl":
            found[name] = [{k: v for k, v in m.items() if not k.startswith("seconds/")} for m in read_metrics(path)]
        elif path.name == "state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    trained(folder, *BUSY)
    found = everything(folder / "run")
    weights = "checkpoints/step-000005/model.safetensors"
    assert {weights, "checkpoints/step-000005/optimizer.safetensors", "trees/step-000003.jsonl.gz"} <= found.keys()
    assert found[weights] != found["checkpoints/step-000004/model.safetensors"]
    return found


def interrupted(folder: Path, number: int, when: Callable[[Path, str], bool]) -> subprocess.Popen[str]:
    """A `treepo train` process that got signal `number` as soon as `when(its folder, what it printed)`."""
    log = folder / "log.txt"
    command = "from treepo.cli import main; main()"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", command, "train", str(write_config(folder)), *BUSY],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    deadline = time.monotonic() + 120
    while not when(folder / "run", log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    process.send_signal(number)
    process.wait(60)
    return process


def reported(run: Path, step: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and f'{{"step": {step}, "reward/mean"' in metrics.read_text()


def test_a_run_killed_in_a_step_ends_as_if_nothing_had_been(tmp_path, undisturbed):
    process = interrupted(tmp_path, signal.SIGKILL, lambda run, _: reported(run, 3))
    assert process.returncode == -signal.SIGKILL
    assert not reported(tmp_path / "run", 5), "it was quicker than the signal"
    resumed = trained(tmp_path, *BUSY, resume=True)
    assert resumed.state.step == 5
    assert everything(tmp_path / "run") == undisturbed


def test_a_run_killed_in_its_warm_up_starts_again(tmp_path, undisturbed):
    process = interrupted(tmp_path, signal.SIGKILL, lambda _, printed: "warm-up 24/120" in printed)
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    trained(tmp_path, *BUSY, resume=True)
    assert everything(tmp_path / "run") == undisturbed


def test_a_run_resumed_after_its_warm_up_ends_as_if_nothing_had_been(tmp_path, undisturbed):
    with training(small_config(tmp_path, *BUSY)) as trainer:
        trainer.stop()
        trainer.run()
    assert trainer.state.step == 0
    trained(tmp_path, *BUSY, resume=True)
    assert everything(tmp_path / "run") == undisturbed


def test_sigterm_ends_the_run_after_the_step_with_a_checkpoint_and_a_hint(tmp_path, undisturbed):
    process = interrupted(tmp_path, signal.SIGTERM, lambda run, _: reported(run, 1))
    run, printed = tmp_path / "run", (tmp_path / "log.txt").read_text()
    assert process.returncode == 130, printed
    last = steps_of(run)[-1]["step"]
    assert 1 <= last < 5
    assert checkpoint.latest(run / "checkpoints").name == f"step-{last:06d}"
    assert f"treepo train {run} --resume" in " ".join(printed.split())
    with training(small_config(tmp_path, *BUSY), resume=True) as trainer:
        assert trainer.state.step == last
        trainer.run()
    found = everything(run)
    assert found["metrics.jsonl"] == undisturbed["metrics.jsonl"]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert found[f"checkpoints/step-000005/{name}"] == undisturbed[f"checkpoints/step-000005/{name}"]


def test_what_a_killed_run_leaves_half_done_is_forgotten(tmp_path, start, undisturbed):
    overrides = ("trainer.save_every=1", "trainer.keep_checkpoints=9", "trainer.save_trees_every=1")
    trained(tmp_path, *start, *overrides)
    run = tmp_path / "run"
    expected = everything(run)
    for rest in (run / "checkpoints" / "step-000002").iterdir():
        rest.unlink()
    (run / "checkpoints" / "step-000002").rmdir()
    half = run / "checkpoints" / ".step-000002.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    trained(tmp_path, *start, *overrides, resume=True)
    assert everything(run) == expected


def test_trees_and_metrics_after_the_checkpoint_are_forgotten_and_those_before_it_kept(tmp_path, random_rollout):
    folder = RunFolder(tmp_path / "run", {}, resume=False)
    for step in (1, 2, 3):
        folder.write_trees(step, [random_rollout(step)])
        folder.record({"step": step})
    folder.metrics.write_text(folder.metrics.read_text() + '{"step": 4, "rew')  # cut off in the middle of a line

    def kept() -> tuple[list[str], list[int]]:
        trees = sorted(file.name for file in (folder.path / "trees").iterdir())
        return trees, [m["step"] for m in read_metrics(folder.metrics)]

    folder.forget_after(2)
    assert kept() == (["step-000001.jsonl.gz", "step-000002.jsonl.gz"], [1, 2])
    folder.forget_after(None)
    assert kept() == ([], [])


def test_a_finished_run_resumes_with_more_steps(tmp_path, start):
    trained(tmp_path, *start, "trainer.steps=1")
    trained(tmp_path, *start, "trainer.steps=3", resume=True)
    assert [m["step"] for m in steps_of(tmp_path / "run")] == [1, 2, 3]


def test_resuming_with_another_setting_names_it(tmp_path, start):
    trained(tmp_path, *start, "trainer.steps=1")
    with pytest.raises(ConfigError, match=r"^sampler\.width: the run in .* has 8, not 4: resume it with its settings"):
        begin(small_config(tmp_path, *start, "sampler.width=4"), resume=True)
    with pytest.raises(ConfigError, match=r"^trainer\.lr: .* has 0\.003, not 0\.001"):
        begin(small_config(tmp_path, *start, "trainer.lr=1e-3"), resume=True)


def test_a_used_folder_is_refused(tmp_path, start):
    trained(tmp_path, *start, "trainer.steps=1")
    before = everything(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^out: .* holds a run already: continue it with --resume, or choose"):
        begin(small_config(tmp_path, *start))
    assert everything(tmp_path / "run") == before
