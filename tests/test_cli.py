"""The command line as a user meets it: own model and data, help, and bad input in one line each."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

import treepo
from tests.support.random_trees import grow_random, rollout_of
from tests.support.small_runs import save_model, save_questions, small_config, write_config
from tests.tasks.test_scoring import gone
from treepo.cli import app, main
from treepo.report.console import SamplingProgress
from treepo.run.build import training
from treepo.run.config import load
from treepo.tree import read_trees

ROOT = Path(__file__).parents[1]
DATASET = str(ROOT / "configs" / "dataset.yaml")
SMALL = ["threads=1", "sampler.width=4", "sampler.segment_tokens=4", "sampler.max_depth=3", "task.instruction=''"]
QUICK = ["trainer.steps=2", "trainer.prompts_per_step=2", "trainer.mini_batches=1", "trainer.eval_every=0"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"}, catch_exceptions=False)


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr with which a command fails; the arguments are those of a shell."""
    monkeypatch.setattr("sys.argv", ["treepo", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
    return errors[0]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    config = small_config(folder, "trainer.eval_every=1", "trainer.steps=1")
    with training(config) as trainer:
        trainer.run()
    return folder / "run"


def own(tmp_path: Path, family: str = "llama", **model: object) -> list[str]:
    """Overrides for a model and questions of the user's own."""
    folder = save_model(tmp_path / "model", family, **model)
    questions = save_questions(tmp_path / "questions.jsonl")
    fraction = "task.test_fraction=0.3"
    return [f"model.path={folder}", f"task.path={questions}", fraction, f"out={tmp_path / 'run'}", *SMALL]


# What works -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "sample", "eval", "doctor"])
def test_help_fits_a_hundred_columns_and_teaches(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 100
    options = [name for option in get_command(app).commands[command].params for name in option.opts if name[:1] == "-"]
    assert [name for name in options if name not in result.output] == []
    if command != "doctor":
        assert "--dry-run" in result.output and "--model" in result.output
        assert re.search(r"treepo \w+ \S+", result.output.split("Arguments")[0].split("Usage")[1]), "an example"


def test_the_version_is_the_packages() -> None:
    assert run("--version").output == f"treepo {treepo.__version__}\n"


@pytest.mark.parametrize("command", ["train", "sample", "eval"])
def test_a_dry_run_prints_a_configuration_that_loads_back(command: str, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    result = run(command, path, "sampler.width=5", "--dry-run")
    again = tmp_path / "again.yaml"
    again.write_text(result.output)
    assert load(again) == load(path, ["sampler.width=5"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_users_own_model_and_questions_train_sample_and_evaluate(family: str, tmp_path: Path) -> None:
    given = own(tmp_path, family)
    result = run("train", DATASET, *given, *QUICK, "trainer.save_trees_every=1", "trainer.dynamic_sampling=null")
    assert result.exit_code == 0, result.output
    newest = tmp_path / "run" / "checkpoints" / "step-000002"
    assert (newest / "model.safetensors").is_file() and (tmp_path / "run" / "curve.png").is_file()
    assert len(list(read_trees(tmp_path / "run" / "trees" / "step-000002.jsonl.gz"))) == 2

    out, svg = tmp_path / "trees.jsonl", tmp_path / "trees.svg"
    result = run(
        "sample", DATASET, *given, "--model", newest, "--problems", 2, "--split", "train", "--out", out, "--svg", svg
    )
    assert result.exit_code == 0, result.output
    assert "2 trees" in result.output and "├──" in result.output and "<svg" in svg.read_text()
    rollouts = list(read_trees(out))
    assert len(rollouts) == 2 and all(len(r.tree.leaves()) == 4 for r in rollouts)

    result = run("eval", tmp_path / "run", "evaluate.samples=2", "--json")
    assert result.exit_code == 0 and json.loads(result.output)["eval/samples"] == 2


def test_a_run_folder_stands_for_its_configuration_and_newest_model(finished_run: Path) -> None:
    result = run("sample", finished_run, "--problems", 1)
    assert result.exit_code == 0 and "1 tree" in result.output
    result = run("eval", finished_run)
    assert result.exit_code == 0 and "sampled pass@1" in result.output and "step-000001" in result.output


def test_trees_are_shown_and_written_as_they_finish(finished_run: Path, tmp_path: Path) -> None:
    for name in ("trees.jsonl", "trees.jsonl.gz"):
        (tmp_path / name).write_text("of an earlier run")
        result = run("sample", finished_run, "--problems", 3, "--out", tmp_path / name, "--draw", 0)
        rows = [line.split("  ") for line in result.output.splitlines() if re.match(r"\d/3", line)]
        assert [row[0] for row in rows] == ["1/3", "2/3", "3/3"]
        rollouts = list(read_trees(tmp_path / name))
        assert [row[1] for row in rows] == [f"problem {rollout.problem_id}" for rollout in rollouts]
        assert sorted(rollout.problem_id for rollout in rollouts) == ["test-0", "test-1", "test-2"]
        assert result.output.index("3/3") < result.output.index("3 trees")


@pytest.mark.parametrize("width", [60, 100])
def test_on_a_terminal_rows_of_a_table_appear_above_a_bar(width: int) -> None:
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    rollouts = [rollout_of(grow_random(seed), seed) for seed in (3, 1, 2)]
    with SamplingProgress(shown, ["p1", "p2", "p3"]) as growing:
        for rollout in rollouts:
            growing.add(rollout)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.file.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if re.match(r"p(roblem|\d) ", line)]
    assert [row.split()[0] for row in rows] == ["problem", "p3", "p1", "p2"]
    for rollout, row in zip(rollouts, rows[1:], strict=True):
        tree = rollout.tree
        assert row.split()[1] == str(len(tree.leaves())) and row.split()[3:5] == [
            str(tree.unique_tokens),
            str(tree.flat_tokens),
        ]
        assert row.index(f" {tree.flat_tokens} ") + len(str(tree.flat_tokens)) == rows[0].index("flat") + 3
    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    assert re.search(rf"sample .* 3/3 reward {sum(rewards) / len(rewards):.2f}  [\d,]+ tok/s", lines[-1])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sampling_that_is_killed_keeps_what_was_finished_and_leaves_no_process(tmp_path: Path, how: int) -> None:
    code = """
        import os, time
        from pathlib import Path

        def reward(prompt, response, answer):
            with Path("workers").open("a") as file:
                file.write(f"{os.getpid()}\\n")
            while prompt != "0+0=?":
                time.sleep(1)
            return len(response)
    """
    (tmp_path / "endless.py").write_text(textwrap.dedent(code))
    out = tmp_path / "trees.jsonl.gz"
    words = ["sample", DATASET, *own(tmp_path), "task.reward=endless:reward", "scoring.timeout_s=600"]
    words += ["task.test_fraction=0", "--split", "train", "--problems", "3", "--out", str(out)]
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, ''); from treepo.cli import main; main()", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("1/3")
        process.send_signal(how)
    assert process.returncode != 0
    (rollout,) = read_trees(out)
    assert None not in rollout.rewards and len(rollout.rewards) == 4
    assert all(gone(int(worker)) for worker in set((tmp_path / "workers").read_text().split()))


def test_a_run_folder_can_be_moved(finished_run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished_run, moved)
    result = run("train", moved, "--resume", "trainer.steps=2")
    assert result.exit_code == 0, result.output
    assert (moved / "checkpoints" / "step-000002").is_dir()
    assert not (finished_run / "checkpoints" / "step-000002").exists()


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_run_without_a_checkpoint_has_no_model_to_use(command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "run").mkdir()
    write_config(tmp_path).rename(tmp_path / "run" / "config.yaml")  # as a run killed in its warm-up
    error = fail(monkeypatch, capsys, command, tmp_path / "run")
    assert f"run: has no checkpoint yet: continue with treepo train {tmp_path / 'run'} --resume" in error


def test_a_finished_run_can_be_resumed_from_its_folder(finished_run: Path) -> None:
    result = run("train", finished_run, "--resume")
    assert result.exit_code == 0 and "resuming after step 1 of 1" in result.output


def test_the_doctor_finds_the_engines_well() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for what in ("engine local", "engine scripted", "bounded rewards", "torch"):
        assert re.search(rf"{what}\s+│ ok", result.output), result.output


def test_a_reward_of_ones_own_is_named_by_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lengths.py").write_text("def brief(prompt, response, answer):\n    return 1 / (1 + len(response))\n")
    monkeypatch.chdir(tmp_path)
    result = run("train", DATASET, *own(tmp_path), *QUICK, "task.reward=lengths:brief", "trainer.save_trees_every=1")
    assert result.exit_code == 0, result.output
    rollouts = list(read_trees(tmp_path / "run" / "trees" / "step-000001.jsonl.gz"))
    for rollout in rollouts:
        for leaf, reward in zip(rollout.tree.leaves(), rollout.rewards, strict=True):
            # One character a token, and EOS is none of them.
            length = rollout.tree.response_length(leaf) - (rollout.tree.nodes[leaf].stop == "eos")
            assert reward == pytest.approx(1 / (1 + length))


# What does not --------------------------------------------------------------------------------------------------------


def test_bad_settings_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    path = write_config(tmp_path)
    for override, message in (
        ("sampler.widht=3", "sampler.widht: unknown key; did you mean 'width'?"),
        ("sampler.width=wide", "sampler.width: Input should be a valid integer"),
        ("sampler.width=0", "sampler.width: Input should be greater than or equal to 1, not 0"),
        ("model.device=toaster", "model.device: 'toaster' is not usable here"),
        ("model.dtype=bfloat16", "model.dtype: training needs float32 weights"),
    ):
        assert message in fail(monkeypatch, capsys, "train", path, override)
    assert "absent.yaml: cannot be read" in fail(monkeypatch, capsys, "train", tmp_path / "absent.yaml")
    assert "--split: must be train or test, not 'dev'" in fail(monkeypatch, capsys, "sample", path, "--split", "dev")


def test_files_that_cannot_be_written_are_one_line(finished_run: Path, monkeypatch, capsys) -> None:
    few = ("sample", finished_run, "--problems", 1)
    error = fail(monkeypatch, capsys, *few, "--out", finished_run)
    assert f"{finished_run}: cannot be written: Is a directory; choose another --out" in error
    error = fail(monkeypatch, capsys, *few, "--svg", finished_run / "absent" / "tree.svg")
    assert "absent/tree.svg: cannot be written: No such file or directory; choose another --svg" in error
    if Path("/dev/full").exists():
        error = fail(monkeypatch, capsys, *few, "--out", "/dev/full")
        assert "/dev/full: cannot be written: No space left on device; choose another --out" in error


def test_a_segment_longer_than_the_context_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    error = fail(monkeypatch, capsys, "train", write_config(tmp_path), "sampler.segment_tokens=64", "warmup=null")
    assert "4 segments of 64 tokens" in error and "lower sampler.segment_tokens or sampler.max_depth" in error


def test_bad_models_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    given = own(tmp_path, eos=False)
    assert "the tokenizer has no EOS token: set `eos_token`" in fail(monkeypatch, capsys, "train", DATASET, *given)
    for absent in (tmp_path / "absent", "absent", "runs/absent/model"):
        given[0] = f"model.path={absent}"
        assert f"model.path: there is no folder {absent}" in fail(monkeypatch, capsys, "train", DATASET, *given)
    (tmp_path / "empty").mkdir()
    given[0] = f"model.path={tmp_path / 'empty'}"
    assert "is not a folder with a config.json" in fail(monkeypatch, capsys, "train", DATASET, *given)


def test_bad_data_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    given = own(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1=?", "answer": "2"}\n{"question": "2+2=?"}\n')
    error = fail(monkeypatch, capsys, "train", DATASET, *given, f"task.path={rows}")
    assert f"{rows}:2: no column 'answer'; found: question" in error
    rows.write_text('{"question": "1+1=?", "answer": "2"}\n{"question": "2+2=?", "answer": null}\n')
    assert f"{rows}:2: 'answer' is empty" in fail(monkeypatch, capsys, "train", DATASET, *given, f"task.path={rows}")
    error = fail(monkeypatch, capsys, "train", DATASET, *given, f"task.path={tmp_path / 'none.jsonl'}")
    assert "task: no such file: " in error
    assert not (tmp_path / "run" / "config.yaml").exists(), "a run that never began does not occupy its folder"


def test_a_prompt_longer_than_the_context_names_its_problem(tmp_path: Path, monkeypatch, capsys) -> None:
    given = own(tmp_path, context=32)
    rows = tmp_path / "rows.jsonl"
    long = [json.dumps({"question": "1+" * (30 * (i == 17)) + f"{i}=?", "answer": i}) for i in range(40)]
    rows.write_text("\n".join(long) + "\n")
    error = fail(monkeypatch, capsys, "train", DATASET, *given, *QUICK, f"task.path={rows}")
    assert re.search(r"problem rows\.jsonl:18: a prompt of \d+ tokens .* exceed the context of 32: drop", error)


def test_a_tree_that_cannot_fit_the_memory_is_one_line_before_anything_takes_long(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """One layer, 2 heads of 16 numbers, keys and values in float32: 256 bytes a token; 2 slots of 32 tokens."""
    small = [str(write_config(tmp_path)), "engine.slots=2", "evaluate.samples=8"]

    def room(tokens: int) -> str:
        return f"engine.memory_gib={(tokens + 2 * 32) * 256 / 2**30}"

    error = fail(monkeypatch, capsys, "train", *small, room(8 * 20))
    assert "a tree of 8 leaves of up to 20 tokens may come to 160, and there is room for 160 with the prompt" in error
    error = fail(monkeypatch, capsys, "train", *small, room(200), "evaluate.samples=10", "trainer.eval_every=1")
    assert "a tree of 10 leaves of up to 20 tokens may come to 200" in error and "evaluate.samples" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert run("train", *small, room(200), "trainer.steps=1", "trainer.eval_every=1").exit_code == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('units')", "reward raised KeyError: 'units'"),
        ("while True: pass", "reward timed out after 0.2 s"),
        ("return float('nan')", "reward is nan"),
    ],
)
def test_a_reward_that_fails_on_every_leaf_fails_the_step_with_its_reason(
    body: str, reason: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "faulty.py").write_text(f"def reward(prompt, response, answer):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    bounds = ["task.reward=faulty:reward", "scoring.timeout_s=0.2", "sampler.width=2", "trainer.prompts_per_step=1"]
    error = fail(monkeypatch, capsys, "train", DATASET, *own(tmp_path), *QUICK, *bounds)
    assert "step 1: 2 of 2 leaves have no reward, above trainer.max_error_rate (0.2)" in error and reason in error


def test_a_reward_that_fails_now_and_then_costs_its_leaves_only(tmp_path: Path, monkeypatch) -> None:
    body = "if len(response) % 2: raise KeyError('odd')\n    return float(len(response) > 6)"
    (tmp_path / "moody.py").write_text(f"def reward(prompt, response, answer):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    settings = ["task.reward=moody:reward", "trainer.max_error_rate=1", "trainer.save_trees_every=1"]
    result = run(
        "train", DATASET, *own(tmp_path), *QUICK, *settings, "trainer.dynamic_sampling=null", "sampler.width=16"
    )
    assert result.exit_code == 0, result.output
    rollouts = list(read_trees(tmp_path / "run" / "trees" / "step-000001.jsonl.gz"))
    unknown = [why for rollout in rollouts for why in rollout.reasons.values()]
    assert unknown and set(unknown) == {"reward raised KeyError: 'odd'"}
    assert any(reward is not None for rollout in rollouts for reward in rollout.rewards)


def test_a_used_folder_and_changed_settings_are_one_line(finished_run: Path, monkeypatch, capsys) -> None:
    assert "holds a run already: continue it with --resume" in fail(monkeypatch, capsys, "train", finished_run)
    error = fail(monkeypatch, capsys, "train", finished_run, "--resume", "sampler.width=5")
    assert "sampler.width: the run in" in error and "has 8, not 5" in error
