"""pass@k and maj@k against enumeration and closed forms; intervals; common random numbers."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.small_runs import small_config
from treepo.engines import Sampling
from treepo.evaluate import Estimate, evaluate, maj_at_k, pass_at_k
from treepo.run.build import build_actor
from treepo.seeds import derive


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_equals_the_enumeration_of_all_draws(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    draws = list(combinations(right, k))
    expected = sum(any(draw) for draw in draws) / comb(len(right), k)
    assert pass_at_k(np.array([right]), k)[0] == pytest.approx(expected)


def test_pass_at_k_wants_at_least_k_responses() -> None:
    with pytest.raises(ValueError, match="pass@5 needs at least 5 responses, not 4"):
        pass_at_k(np.ones((1, 4), bool), 5)


def majority(answers: list[str | None], right: str, k: int = 16) -> float:
    marks = np.array([[answer == right for answer in answers]])
    return float(maj_at_k([answers], marks, k, seed=0)[0])


def test_maj_at_k_of_unanimous_responses_is_certain() -> None:
    assert majority(["7"] * 16, "7") == 1.0
    assert majority(["8"] * 16, "7") == 0.0


def test_responses_without_an_answer_do_not_vote() -> None:
    assert majority([None] * 15 + ["7"], "7", k=64) > 0.97
    assert majority([None] * 16, "7") == 0.0
    assert majority([None, "7"], "7", k=1) == pytest.approx(0.5, abs=0.08), "a draw without a vote is wrong"


def test_a_tie_counts_by_the_share_of_the_tied_answers_that_is_right() -> None:
    # Two responses drawn from a half and half pair: 1/4 both right, 1/2 tied, 1/4 both wrong.
    assert majority(["7", "8"], "7", k=2) == pytest.approx(0.5, abs=0.04)


def test_maj_at_k_equals_the_exact_probability_of_a_majority() -> None:
    answers: list[str | None] = ["7", "7", "8"]
    exact = (2 / 3) ** 3 + 3 * (2 / 3) ** 2 * (1 / 3)
    assert majority(answers, "7", k=3) == pytest.approx(exact, abs=0.04)


def test_an_estimate_prints_its_interval() -> None:
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_an_evaluation_is_a_function_of_model_and_seed(tmp_path) -> None:
    config = small_config(tmp_path, "warmup.steps=120", "evaluate.problems=4", "evaluate.samples=8")
    with build_actor(config) as actor:
        first = evaluate(actor, config.sampler, config.evaluate, seed=1)
        assert evaluate(actor, config.sampler, config.evaluate, seed=1) == first
        others = [evaluate(actor, config.sampler, config.evaluate, seed) for seed in range(2, 6)]
        assert {other.greedy.mean for other in others} == {first.greedy.mean}, "greedy responses depend on no seed"
        assert len({other.pass_at_1.mean for other in others}) > 1, "sampled ones do"
        assert first.problems == 4 and first.samples == 8 and first.unscored == 0
        for estimate in (first.greedy, first.pass_at_1, first.pass_at_k, first.maj_at_k):
            assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        assert first.pass_at_1.mean <= first.pass_at_k.mean
        metrics = first.metrics()
        assert metrics["eval/sampled/pass@8"] == first.pass_at_k.mean
        names = {"eval/greedy/pass@1", "eval/sampled/pass@1/low", "eval/sampled/maj@8/high", "eval/problems"}
        assert names <= metrics.keys()


@pytest.mark.parametrize("slots", [3, 128])
def test_answering_all_at_once_measures_the_same_as_answering_greedily_first(tmp_path, slots: int) -> None:
    shape = ["task.test_problems=6", "evaluate.problems=6", "evaluate.samples=5", f"engine.slots={slots}"]
    config = small_config(tmp_path, "warmup.steps=80", *shape, "evaluate.sampling={temperature: 0.8, top_k: 9}")
    with build_actor(config) as actor:
        progress: list[tuple[int, int]] = []
        found = evaluate(actor, config.sampler, config.evaluate, 1, lambda *done: progress.append(done))
        assert progress == [(i + 1, 12) for i in range(12)]

        seed = derive(1, "evaluate")
        asked = [(f"test/{problem.id}", problem) for problem in actor.task.problems("test")[:6]]
        iid = config.sampler.model_copy(update={"mode": "iid", "width": 5, "sampling": config.evaluate.sampling})
        one = iid.model_copy(update={"width": 1, "sampling": Sampling(temperature=0.0)})
        greedy, sampled = (actor.sample(asked, actor.sampler(shape), seed).trees for shape in (one, iid))
        right = np.array([[reward == 1.0 for reward in r.rewards] for r in sampled])
        said = [[actor.task.final_answer(actor.decode(r.tree.response(n))) for n in r.tree.leaves()] for r in sampled]
        assert found.greedy.mean == np.mean([r.rewards[0] for r in greedy])
        assert found.pass_at_1.mean == right.mean(axis=1).mean()
        assert found.pass_at_k.mean == pass_at_k(right, 5).mean()
        assert found.maj_at_k.mean == maj_at_k(said, right, 5, seed).mean()
        assert found.response_tokens == np.mean([r.tree.response_length(n) for r in sampled for n in r.tree.leaves()])
        assert 0 < found.greedy.mean != found.pass_at_1.mean > 0, "the test wants a model that is right now and then"
