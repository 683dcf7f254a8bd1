"""Studies: intervals, curves, prefix trees; cells that are kept, stopped and gone on with; the command."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from tests.support.small_runs import PROGRAM, small_config, write_config
from treepo.cli import app
from treepo.errors import ConfigError, TreePOError
from treepo.report.study import rich_table, text
from treepo.run.config import Config, changed
from treepo.studies import STUDIES, find
from treepo.studies.headline import SWEEP, TOKENS, Headline, reach_table
from treepo.studies.run import Listener, Runner
from treepo.studies.sampling import common_prefix, distinct_beginnings, distinct_tokens
from treepo.studies.statistics import Mean, at, band, first_reach, paired
from treepo.studies.study import Cell, Findings, Result, Results, Stopped, Study, Table, Watch, by_arm, from_start
from treepo.studies.training import Divergence, Segment, score_table, summary
from treepo.studies.variance import Variance

# Statistics


def test_an_interval_is_students() -> None:
    # 2.776 is the 97.5 % quantile of Student's t with 4 degrees of freedom.
    found = Mean.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.n == 5
    assert found.high == pytest.approx(3 + 2.7764 * np.sqrt(2.5) / np.sqrt(5), abs=1e-3)
    assert found.low == pytest.approx(6 - found.high)
    assert Mean.of([2.0]) == Mean(2.0, None, None, 1)


def test_a_ratios_interval_is_that_of_its_logarithm() -> None:
    found = Mean.of_ratios([0.5, 2.0])
    logs = Mean.of([-np.log(2), np.log(2)])
    assert (found.mean, found.low, found.high) == pytest.approx((1, np.exp(logs.low), np.exp(logs.high)))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = [(m := Mean.of(rng.normal(3, 2, 5).tolist())).low <= 3 <= m.high for _ in range(2000)]
    assert 0.935 < np.mean(inside) < 0.965


def test_differences_are_taken_seed_by_seed() -> None:
    assert paired({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.5, 0: 0.5, 3: 0.0}) == Mean.of([0.5, 0.5])
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_curve_is_read_between_its_points() -> None:
    x, y = [0, 10, 30], [0.2, 0.6, 0.8]
    assert [at(x, y, w) for w in (-5, 0, 5, 20, 99)] == pytest.approx([0.2, 0.2, 0.4, 0.7, 0.8])
    assert first_reach(x, y, 0.7) == pytest.approx(20)
    assert first_reach(x, y, 0.1) == 0 and first_reach(x, y, 0.81) is None
    assert first_reach([0, 1, 2, 3], [0.0, 0.5, 0.3, 0.9], 0.4) == pytest.approx(0.8), "the first time, not the last"


def test_a_band_ends_where_the_shortest_curve_does() -> None:
    grid, means = band([([0, 4], [0, 4]), ([0, 8], [2, 2])], points=5)
    assert grid.tolist() == [0, 1, 2, 3, 4]
    assert [m.mean for m in means] == [1, 1.5, 2, 2.5, 3]


# Prefix trees

responses = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=7)


@given(responses)
def test_overlap_equals_its_definition(found: list[list[int]]) -> None:
    prefixes = {tuple(r[: n + 1]) for r in found for n in range(len(r))}
    assert distinct_tokens(found) == len(prefixes)
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    common = [sum(a[: n + 1] == b[: n + 1] for n in range(min(len(a), len(b)))) for a, b in pairs]
    assert common_prefix(found) == pytest.approx(np.mean(common))
    ends = distinct_beginnings(found, 4)
    assert ends[0] == 1 / len(found) and ends[-1] == len(set(map(tuple, found))) / len(found)
    assert ends == sorted(ends)


# Tables


def run_of(*scores: float, tokens: int = 100) -> Result:
    curve = [
        {
            "step": i,
            "tokens": i * tokens,
            "seconds": float(i),
            "pass_at_1": s,
            "greedy": s,
            "pass_at_k": s,
            "maj_at_k": s,
        }
        for i, s in enumerate(scores)
    ]
    return {"curve": curve, "tokens": curve[-1]["tokens"], "seconds": curve[-1]["seconds"]}


def test_arms_are_compared_at_the_end_at_equal_tokens_and_at_equal_seconds() -> None:
    arms = {"a": {0: run_of(0.0, 0.4, 0.8), 1: run_of(0.0, 0.2, 0.6)}, "b": {0: run_of(0.0, 0.5, 0.7, tokens=50)}}
    (_, end, none, tokens, *_), (_, b_end, b_less, b_tokens, b_tokens_less, *_) = score_table(arms).rows
    assert (end, none, tokens) == (Mean.of([0.8, 0.6]), None, Mean.of([0.4, 0.2])), "all have 100 tokens at least"
    assert b_end == Mean.of([0.7]) and b_less.mean == pytest.approx(-0.1) and b_tokens_less.mean == pytest.approx(0.3)
    assert b_tokens == Mean.of([0.7])


def test_tokens_to_a_share_of_the_baselines_gain() -> None:
    arms = {"grpo": {0: run_of(0.2, 0.4, 0.6)}, "treepo": {0: run_of(0.2, 0.6, 0.6), 1: run_of(0.2, 0.3, 0.3)}}
    table = reach_table(arms)
    assert table.columns[1::2] == ("to 0.400", "to 0.500", "to 0.560", "to 0.600")
    grpo, treepo = table.rows
    assert [r.mean for r in grpo[1::2]] == pytest.approx([1, 1, 1, 1]) and grpo[2::2] == ["1 of 1"] * 4
    assert [r.mean for r in treepo[1::2]] == pytest.approx([50 / 100, 75 / 150, 90 / 180, 100 / 200])
    assert treepo[2::2] == ["1 of 2"] * 4


def test_a_summary_adds_up_what_the_steps_took() -> None:
    def step(n: int) -> dict:
        return {
            "step": n,
            "tokens_generated": 10 * n,
            "seconds": {"step": n / 2},
            "sharing": 2.0,
            "reward": 0.5,
            "queries_used": 3,
            "queries_sampled": 4,
            "response_tokens": 7.0,
            "surprisal": 0.1,
        }

    def held_out(n: int, score: float) -> dict:
        mean = {"mean": score}
        found = {"pass_at_1": mean, "greedy": mean, "pass_at_k": mean, "maj_at_k": mean, "response_tokens": 5.0}
        return {"step": n, "evaluation": found}

    found = summary([held_out(0, 0.1), step(1), step(2), held_out(2, 0.6), step(3)])
    assert [(p["step"], p["tokens"], p["seconds"], p["pass_at_1"]) for p in found["curve"]] == [
        (0, 0, 0.0, 0.1),
        (2, 30, 1.5, 0.6),
    ]
    assert (found["tokens"], found["seconds"], found["queries_used"]) == (60, 3.0, 0.75)


def test_numbers_are_written_with_their_intervals() -> None:
    values = [
        None,
        "x",
        7,
        0.12345,
        12.345,
        4321.0,
        Mean(0.5, 0.4, 0.6, 5),
        Mean(1.5, 1.2, 2.0, 5),
        Mean(0.5, None, None, 1),
    ]
    shown = ["-", "x", "7", "0.123", "12.3", "4,321", "0.500 ±0.100", "1.500 [1.200, 2.00]", "0.500"]
    assert [text(v) for v in values] == shown
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(rich_table(Table("t [1]", ("arm", "end"), (("a[0]", Mean(0.5, 0.4, 0.6, 5)),))))
    assert "a[0]" in (shown_table := console.export_text()) and "t [1]" in shown_table


# Cells


class Counting(Study):
    """Counts to three, slowly if told to; two stages, of which the second is known only after the first."""

    title: ClassVar[str] = "Counting"
    question: ClassVar[str] = "How far?"
    wait_for: str = ""
    bad: bool = False

    def cells(self, config: Config, done: Results) -> list[Cell]:
        first = [Cell("first", seed, stage="pilot") for seed in range(self.seeds)]
        if not all(cell in done for cell in first):
            return first
        lr = 10 * done[first[0]]["count"]
        return first + [Cell("second", seed, (f"trainer.lr={lr}",)) for seed in range(self.seeds)]

    def measure(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        if self.bad and cell.seed == 1:
            raise TreePOError("one is bad")
        with (folder / "begun").open("a") as file:
            file.write("x")
        for count in range(3):
            while self.wait_for and not Path(self.wait_for).exists() and cell.stage == "main":
                watch.progress(count / 3)
                time.sleep(0.01)
            watch.progress(count / 3, "counting")
        return {"count": 3 + cell.seed, "lr": config.trainer.lr, "seed": config.seed}

    def findings(self, config: Config, done: Results) -> Findings:
        return Findings((), ())


class Heard(Listener):
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def planned(self, done: int, known: int) -> None:
        self.events.append(("planned", done, known))

    def progress(self, cell: Cell, part: float, note: str) -> None:
        self.events.append(("progress", cell.name, part))

    def finished(self, cell: Cell, result: Result) -> None:
        self.events.append(("finished", cell.name))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path)


def test_later_stages_follow_from_earlier_ones_and_what_is_done_is_not_done_again(
    tmp_path: Path, config: Config
) -> None:
    heard = Heard()
    runner = Runner("counting", Counting(seeds=1), config, tmp_path / "out", heard)
    assert runner()
    assert [(c.stage, c.seed, r["count"], r["lr"], r["seed"]) for c, r in runner.done.items()] == [
        ("pilot", 0, 3, 3e-3, 0),
        ("main", 0, 3, 30, 0),
    ]
    assert [e for e in heard.events if e[0] == "planned"] == [("planned", 0, 1), ("planned", 1, 2), ("planned", 2, 2)]
    assert ("progress", "pilot/first/seed-0", 2 / 3) in heard.events
    more = Runner("counting", Counting(seeds=2, jobs=2), config, tmp_path / "out")
    assert more() and [r["lr"] for r in more.done.values()] == [3e-3, 3e-3, 30, 30]
    begun = {
        path.parent.name: path.read_text() for path in (tmp_path / "out" / "cells" / "pilot" / "first").glob("*/begun")
    }
    assert begun == {"seed-0": "x", "seed-1": "x"}


def test_a_cell_that_fails_ends_the_study_with_its_name_and_keeps_the_others(tmp_path: Path, config: Config) -> None:
    runner = Runner("counting", Counting(seeds=2, bad=True), config, tmp_path / "out")
    with pytest.raises(TreePOError, match="pilot/first/seed-1: one is bad"):
        runner()
    assert (tmp_path / "out" / "cells" / "pilot" / "first" / "seed-0" / "result.json").is_file()


def test_a_folder_belongs_to_one_study(tmp_path: Path, config: Config) -> None:
    out = tmp_path / "out"
    Runner("counting", Counting(seeds=1), config, out)
    Runner("counting", Counting(seeds=9, jobs=2), changed(config, ["out=elsewhere"]), out)
    with pytest.raises(ConfigError, match="holds a study with another settings"):
        Runner("counting", Counting(seeds=1, bad=True), config, out)
    with pytest.raises(ConfigError, match="holds a study with another config"):
        Runner("counting", Counting(seeds=1), changed(config, ["trainer.lr=1"]), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no study"):
        Runner("counting", Counting(), config, tmp_path / "mine")


def test_a_watch_that_nobody_handles_ends_the_cell_and_one_that_is_handled_does_not() -> None:
    watch = Watch()
    watch.progress(0.5)
    watch.stop()
    with pytest.raises(Stopped):
        watch.progress(0.6)
    watch, called = Watch(), []
    watch.on_stop(lambda: called.append(1))
    watch.stop()
    watch.progress(0.6)
    assert called == [1] and watch.stopping


# Studies


def test_every_study_says_what_it_asks_and_has_a_quick_version(config: Config) -> None:
    for name in STUDIES:
        found = find(name)
        assert found.title and found.question.endswith(")") and type(found).__doc__
        quick = find(name, quick=True)
        assert quick.seeds < 5 and quick != found
        assert find(name, ["seeds=4"], quick=True).seeds == 4
        changed(config, quick.quick_config())


def test_a_study_or_setting_that_does_not_exist_is_named_with_the_nearest_that_does() -> None:
    with pytest.raises(ConfigError, match=r"no study is called 'headlines'.*did you mean 'headline'"):
        find("headlines")
    with pytest.raises(ConfigError, match=r"study\.seed: unknown key; did you mean 'seeds'"):
        find("headline", ["seed=3"])
    with pytest.raises(ConfigError, match=r"study\.seeds: .*greater than or equal to 1, not 0"):
        find("headline", ["seeds=0"])


def test_every_arm_of_every_study_is_a_valid_configuration(tmp_path: Path) -> None:
    config = small_config(tmp_path, "sampler.segment_tokens=4", "sampler.max_depth=4")
    for name in STUDIES:
        found = find(name)
        arms = (
            found.arms_at(config, {"i.i.d.": 4, "tree": 6, "spread": 9, "half": 8, "narrow": 10})
            if isinstance(found, Headline)
            else found.arms(config)
        )
        resolved = [changed(config, overrides) for overrides in arms.values()]
        assert len({r.model_dump_json() for r in resolved}) == len(arms), f"two arms of {name} are the same"


def test_a_study_of_gradients_wants_enough_problems(config: Config, tmp_path: Path) -> None:
    cell = Cell("policy gradient", 0, stage="truth")
    with pytest.raises(ConfigError, match="the task has 4 problems to train on"):
        Variance(problems=2, truth_problems=3).measure(changed(config, ["warmup.steps=1"]), cell, tmp_path, Watch())


def test_segments_keep_the_response_budget(config: Config) -> None:
    arms = Segment(segment_tokens=[1, 5, 10]).arms(config)
    assert [changed(config, overrides).sampler.response_tokens for overrides in arms.values()] == [20, 20, 20]
    with pytest.raises(ConfigError, match="3 does not divide the response budget of 20"):
        Segment(segment_tokens=[3]).arms(config)


def test_a_study_that_trains_wants_evaluations(config: Config) -> None:
    with pytest.raises(ConfigError, match="eval_every=0"):
        Divergence().cells(config, {})


def test_rates_are_chosen_by_the_sweep_and_queries_by_tokens(config: Config) -> None:
    config = changed(config, ["trainer.eval_every=1"])
    found = Headline(seeds=2, rates=[0.5, 1.0])
    done: dict[Cell, Result] = {}
    stages = []
    while todo := [c for c in found.cells(config, done) if c not in done]:
        stages.append({c.stage for c in todo})
        for cell in todo:
            arm = changed(config, cell.overrides)
            if cell.stage == "start":
                done[cell] = {"model": f"m{cell.seed}"}
            elif cell.stage == TOKENS:
                tokens = {"i.i.d.": 300.0, "tree": 200.0, "spread": 150.0, "half": 160.0, "narrow": 100.0}
                done[cell] = {"tokens_per_query": tokens[cell.arm]}
            elif cell.stage == SWEEP and arm.sampler.mode == "iid" and arm.trainer.lr > 2e-3:
                done[cell] = {"failed": "the gradient is not finite"}
            else:
                done[cell] = run_of(0.1, arm.trainer.lr)
    assert stages == [{"start"}, {TOKENS}, {SWEEP}, {"main"}]
    assert {c.seed for c in done if c.stage == SWEEP}.isdisjoint({c.seed for c in done if c.stage == "main"})
    main = {c.arm: changed(config, c.overrides) for c in done if c.stage == "main"}
    assert {arm: r.trainer.lr for arm, r in main.items()} == {
        "grpo": 1.5e-3,
        "grpo on trees": 3e-3,
        "treepo": 3e-3,
        "treepo, 6 queries": 3e-3,
        "spread, 8 queries": 3e-3,
        "grpo, 4 leaves, 8 queries": 1.5e-3,
        "narrow, 4 leaves, 12 queries": 3e-3,
    }
    assert main["treepo, 6 queries"].trainer.prompts_per_step == 6 and main["treepo"].trainer.prompts_per_step == 4
    half, narrow = main["grpo, 4 leaves, 8 queries"], main["narrow, 4 leaves, 12 queries"]
    assert (half.sampler.mode, half.sampler.width, half.advantage.kind) == ("iid", 4, "grpo")
    assert (narrow.sampler.mode, narrow.sampler.width, narrow.advantage.kind) == ("tree", 4, "treepo")
    assert narrow.sampler.branching.every == 2 and narrow.trainer.prompts_per_step == 12
    assert all(r.model.path.startswith("m") and r.model.create is None and r.warmup is None for r in main.values())
    assert set(by_arm(done)) == set(main)
    assert from_start(changed(config, ["model={path: mine}", "warmup=null"]), 0, {}) == ()


# The command

FIRST = "study.first=[2, [2, 8]]"
TINY = ["trainer.steps=3", "trainer.eval_every=1", "warmup.steps=20"]


def test_a_study_of_the_command_line_is_a_table_a_plot_json_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "study"
    given = ["study", "divergence", write_config(tmp_path), *TINY, f"out={out}", "study.seeds=2", "study.jobs=2", FIRST]
    result = CliRunner().invoke(app, [str(x) for x in given], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "How wide should a tree open" in result.output and "first 2 to 8" in result.output
    found = json.loads((out / "results.json").read_text())
    assert len(found["cells"]) == 2 + 2 * 2 and found["versions"]["torch"] and found["device"]
    page = (out / "report.html").read_text()
    assert "first 2 to 8" in page and "data:image/png;base64," in page and "http" not in page.replace("http-", "")
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("cells/main/*/*/run/checkpoints")), "a finished run leaves its metrics only"


def test_a_study_that_is_interrupted_goes_on_where_it_was_and_ends_the_same(tmp_path: Path) -> None:
    config = write_config(tmp_path, PROGRAM)
    steps = ["trainer.steps=12", "trainer.eval_every=4", "trainer.save_every=50", "warmup.steps=20"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def command(out: Path) -> list[str]:
        main = "from treepo.cli import main; main()"
        return [
            sys.executable,
            "-c",
            main,
            "study",
            "divergence",
            str(config),
            *steps,
            f"out={out}",
            "study.seeds=1",
            FIRST,
        ]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command(parts), stdout=subprocess.PIPE, text=True, env=environment)
    metrics = parts / "cells" / "main" / "first-2-to-8" / "seed-0" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count('"reward"') < 2:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=200)
    assert running.returncode == 130 and "the same command goes on" in said
    assert not (parts / "results.json").exists() and list(metrics.parent.glob("checkpoints/step-*"))
    for out in (parts, whole):
        done = subprocess.run(command(out), capture_output=True, text=True, env=environment, timeout=250)
        assert done.returncode == 0, done.stderr
    a, b = (json.loads((out / "results.json").read_text()) for out in (parts, whole))
    timeless = ("curve", "surprisal", "reward", "tokens")
    for x, y in zip(a["cells"], b["cells"], strict=True):
        for point in (*x["result"].get("curve", []), *y["result"].get("curve", [])):
            point.pop("seconds")
        assert [x["result"].get(k) for k in timeless] == [y["result"].get(k) for k in timeless]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("overlap", ["study.problems=4", "study.responses=4"]),
        ("compute", ["study.problems=4", "study.widths=[2, 4]", "study.divergences=[2]"]),
        (
            "efficiency",
            [
                "study.response_tokens=16",
                "study.segment_tokens=[4, 8]",
                "study.divergences=[2]",
                "study.rollouts=[4]",
                "study.rows=8",
            ],
        ),
        ("variance", ["study.problems=2", "study.truth_problems=2"]),
    ],
)
def test_studies_that_do_not_train_run(name: str, more: list[str], tmp_path: Path) -> None:
    out = tmp_path / "study"
    given = ["study", name, write_config(tmp_path), "warmup.steps=5", f"out={out}", "study.seeds=1", *more]
    result = CliRunner().invoke(app, [str(x) for x in given], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert (out / "report.html").is_file()
