"""Comparisons of trained arms: at the end, at equal tokens, at equal seconds."""

from __future__ import annotations

import pytest

from tests.support.small_studies import run_of
from treepo.studies.statistics import Mean
from treepo.studies.training import score_table, summary


def test_arms_are_compared_at_the_end_at_equal_tokens_and_at_equal_seconds() -> None:
    arms = {"a": {0: run_of(0.0, 0.4, 0.8), 1: run_of(0.0, 0.2, 0.6)}, "b": {0: run_of(0.0, 0.5, 0.7, tokens=50)}}
    (_, end, none, tokens, *_), (_, b_end, b_less, b_tokens, b_tokens_less, *_) = score_table(arms).rows
    assert (end, none, tokens) == (Mean.of([0.8, 0.6]), None, Mean.of([0.4, 0.2])), "all have 100 tokens at least"
    assert b_end == Mean.of([0.7]) and b_less.mean == pytest.approx(-0.1) and b_tokens_less.mean == pytest.approx(0.3)
    assert b_tokens == Mean.of([0.7])


def test_a_summary_adds_up_what_the_steps_took() -> None:
    def step(n: int) -> dict:
        return {
            "step": n,
            "tokens/generated": 10 * n,
            "seconds/step": n / 2,
            "tokens/sharing": 2.0,
            "reward/mean": 0.5,
            "prompts/used": 3,
            "prompts/sampled": 4,
            "response_tokens/mean": 7.0,
            "entropy/sampled": 0.1,
        }

    def held_out(n: int, score: float) -> dict:
        names = {"sampled/pass@1": 0.0, "greedy/pass@1": 0.1, "sampled/pass@4": 0.2, "sampled/maj@4": 0.3}
        more = {"eval/samples": 4, "eval/response_tokens/mean": 5.0}
        return {"step": n, **{f"eval/{name}": score + more for name, more in names.items()}, **more}

    found = summary([held_out(0, 0.1), step(1), step(2), held_out(2, 0.6), step(3)])
    assert [(p["step"], p["tokens"], p["seconds"], p["pass_at_1"]) for p in found["curve"]] == [
        (0, 0, 0.0, 0.1),
        (2, 30, 1.5, 0.6),
    ]
    last = found["curve"][-1]
    assert [last[x] for x in ("greedy", "pass_at_k", "maj_at_k")] == pytest.approx([0.7, 0.8, 0.9])
    assert (found["tokens"], found["seconds"], found["prompts_used"]) == (60, 3.0, 0.75)
    assert (found["entropy"], found["reward"], found["sharing"]) == ([0.1] * 3, [0.5] * 3, 2.0)
