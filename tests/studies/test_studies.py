"""All studies: their settings, their arms, and small versions of them measured in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.small_runs import small_config
from tests.support.small_studies import measure_here
from treepo.errors import ConfigError
from treepo.report.study import write_report
from treepo.run.config import Config, changed
from treepo.studies import STUDIES, find
from treepo.studies.headline import HeadlineStudy
from treepo.studies.run import StudyFolder
from treepo.studies.training import DivergenceStudy, SegmentStudy


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
            if isinstance(found, HeadlineStudy)
            else found.arms(config)
        )
        resolved = [changed(config, overrides) for overrides in arms.values()]
        assert len({r.model_dump_json() for r in resolved}) == len(arms), f"two arms of {name} are the same"


def test_segments_keep_the_response_budget(config: Config) -> None:
    arms = SegmentStudy(segment_tokens=[1, 5, 10]).arms(config)
    assert [changed(config, overrides).sampler.response_tokens for overrides in arms.values()] == [20, 20, 20]
    with pytest.raises(ConfigError, match="3 does not divide the response budget of 20"):
        SegmentStudy(segment_tokens=[3]).arms(config)


def test_a_study_that_trains_wants_evaluations(config: Config) -> None:
    with pytest.raises(ConfigError, match="eval_every=0"):
        DivergenceStudy().cells(config, {})


def test_a_study_that_trains_compares_its_arms_in_tables_a_plot_json_and_a_page(
    warmed_up: Config, tmp_path: Path
) -> None:
    config = changed(warmed_up, ["trainer.steps=2", "trainer.eval_every=1"])
    out = tmp_path / "study"
    folder = measure_here(StudyFolder("divergence", DivergenceStudy(seeds=2, first=[2, (2, 8)]), config, out))
    write_report(folder, folder.study.findings(config, folder.done))
    found = json.loads((out / "results.json").read_text())
    assert len(found["cells"]) == 2 * 2 and found["versions"]["torch"] and found["device"]
    scores, costs = found["tables"]
    assert [row[0] for row in scores["rows"]] == [row[0] for row in costs["rows"]] == ["first 2", "first 2 to 8"]
    assert scores["rows"][0][2] is None and scores["rows"][1][2]["n"] == 2, "differences are to the first arm"
    page = (out / "report.html").read_text()
    assert "first 2 to 8" in page and "data:image/png;base64," in page and "http" not in page.replace("http-", "")
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("cells/main/*/*/run/checkpoints")), "a finished run leaves its metrics only"


@pytest.mark.parametrize(
    ("name", "settings", "cells"),
    [
        ("overlap", ["problems=4", "responses=4"], 2),
        ("compute", ["problems=4", "widths=[2, 4]", "divergences=[2]"], 2),
        (
            "efficiency",
            ["response_tokens=16", "segment_tokens=[4, 8]", "divergences=[2]", "rollouts=[4]", "rows=8"],
            1,
        ),
        ("variance", ["problems=2", "truth_problems=2"], 11),
    ],
)
def test_studies_that_do_not_train_run(
    name: str, settings: list[str], cells: int, warmed_up: Config, tmp_path: Path
) -> None:
    folder = measure_here(StudyFolder(name, find(name, ["seeds=1", *settings]), warmed_up, tmp_path / "study"))
    assert len(folder.done) == cells
    paths = write_report(folder, folder.study.findings(warmed_up, folder.done))
    assert all(path.is_file() for path in paths.values())
