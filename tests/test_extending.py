"""docs/extending.md: every example is run as it stands, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.small_runs import save_model, save_questions, write_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```python title="(.*?)"\n(.*?)```', PAGE, flags=re.DOTALL))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
SMALL = [
    "trainer.steps=1",
    "trainer.dynamic_sampling=null",
    "trainer.prompts_per_step=2",
    "warmup.steps=2",
    "threads=1",
    "out=run",
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the files of the page, a model and problems under the names that the page uses."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    save_model(tmp_path / "MODEL")
    save_questions(tmp_path / "problems.jsonl")
    (tmp_path / "configs").mkdir()
    write_config(tmp_path).rename(tmp_path / "configs" / "program.yaml")
    dataset = (ROOT / "configs" / "dataset.yaml").read_text(encoding="utf-8")
    (tmp_path / "configs" / "dataset.yaml").write_text(dataset, encoding="utf-8")
    return tmp_path


def run(here: Path, words: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=[re.search(r"my_\w+", line)[0] for line in COMMANDS])
def test_a_command_runs_with_the_class_of_the_page(here: Path, command: str) -> None:
    program, *words = shlex.split(command)
    assert program == "treepo"
    small = list(SMALL)
    if "dataset" in command:
        small = ["threads=1", "sampler.width=3", "sampler.segment_tokens=4", "sampler.max_depth=3"]
    out = run(here, ["-m", "treepo", *words, *small])
    if "my_engine" in command:
        assert re.search(r"^\d+ trees were opened$", out, flags=re.MULTILINE)
    if "my_loss" in command:
        metrics = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
        assert any("loss/gap" in line for line in metrics)


@pytest.mark.parametrize("name", ["my_run.py", "my_loop.py"])
def test_a_program_of_the_page_runs(here: Path, name: str) -> None:
    out = run(here, [name])
    if name == "my_run.py":
        assert len((here / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    else:
        assert len(re.findall(r"^step \d: \d+ tokens in \d+ rows", out, flags=re.MULTILINE)) == 5


def test_the_page_has_an_example_of_every_kind_and_uses_every_file() -> None:
    kinds = {"my_reward", "my_task", "my_estimator", "my_loss", "my_policies", "my_engine", "my_run", "my_loop"}
    assert {name.removesuffix(".py") for name in FILES} == kinds
    used = {name for line in COMMANDS for name in re.findall(r"my_\w+", line)}
    assert used | {"my_run", "my_loop"} == kinds


def test_the_loop_is_twenty_lines() -> None:
    loop = FILES["my_loop.py"].split("task = ProgramTask()")[1].strip().splitlines()
    assert len(loop) <= 20
