"""The headline study: its stages, its rates, and the tokens to reach an accuracy."""

from __future__ import annotations

import pytest

from tests.support.small_studies import run_of
from treepo.run.config import Config, changed
from treepo.studies.findings import Result
from treepo.studies.headline import SWEEP, TOKENS, HeadlineStudy, reach_table
from treepo.studies.study import Cell, by_arm, from_start


def test_tokens_to_a_share_of_the_baselines_gain() -> None:
    arms = {"grpo": {0: run_of(0.2, 0.4, 0.6)}, "treepo": {0: run_of(0.2, 0.6, 0.6), 1: run_of(0.2, 0.3, 0.3)}}
    table = reach_table(arms)
    assert table.columns[1::2] == ("to 0.400", "to 0.500", "to 0.560", "to 0.600")
    grpo, treepo = table.rows
    assert [r.mean for r in grpo[1::2]] == pytest.approx([1, 1, 1, 1]) and grpo[2::2] == ["1 of 1"] * 4
    assert [r.mean for r in treepo[1::2]] == pytest.approx([50 / 100, 75 / 150, 90 / 180, 100 / 200])
    assert treepo[2::2] == ["1 of 2"] * 4


def test_rates_are_chosen_by_the_sweep_and_numbers_of_prompts_by_tokens(config: Config) -> None:
    config = changed(config, ["trainer.eval_every=1"])
    found = HeadlineStudy(seeds=2, rates=[0.5, 1.0])
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
                done[cell] = {"tokens_per_prompt": tokens[cell.arm]}
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
        "treepo, 6 prompts": 3e-3,
        "spread, 8 prompts": 3e-3,
        "grpo, 4 leaves, 8 prompts": 1.5e-3,
        "narrow, 4 leaves, 12 prompts": 3e-3,
    }
    assert main["treepo, 6 prompts"].trainer.prompts_per_step == 6 and main["treepo"].trainer.prompts_per_step == 4
    half, narrow = main["grpo, 4 leaves, 8 prompts"], main["narrow, 4 leaves, 12 prompts"]
    assert (half.sampler.mode, half.sampler.width, half.advantage.kind) == ("iid", 4, "grpo")
    assert (narrow.sampler.mode, narrow.sampler.width, narrow.advantage.kind) == ("tree", 4, "treepo")
    assert narrow.sampler.branching.every == 2 and narrow.trainer.prompts_per_step == 12
    assert all(r.model.path.startswith("m") and r.model.create is None and r.warmup is None for r in main.values())
    assert set(by_arm(done)) == set(main)
    assert from_start(changed(config, ["model={path: mine}", "warmup=null"]), 0, {}) == ()
