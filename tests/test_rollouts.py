"""Answers in the order in which they are finished: rewards are computed while other trees still grow."""

import asyncio
import textwrap
import time

import pytest

from tests.support.small_runs import save_model
from treepo.engines.scripted import ScriptedEngine
from treepo.models import causal_lm
from treepo.rollouts import Actor, require_room
from treepo.sampler import Sampler, SamplerSettings
from treepo.seeds import generator
from treepo.tasks import Problem
from treepo.tasks.dataset import DatasetTask
from treepo.tasks.scoring import Score, Scorer, ScoringSettings
from treepo.tree import ScoredTree, Stop

EOS = 0  # of the tokenizer of characters
MEETING = """
    import time
    from pathlib import Path

    def reward(prompt, response, answer):
        if prompt == "quick":
            Path("the reward has begun").touch()
            while not Path("the reward may end").exists():
                time.sleep(0.01)
        return len(prompt)
"""
MOODY = """
    import os

    def reward(prompt, response, answer):
        if len(response) % 5 == 4:
            raise ValueError(prompt)
        if sum(map(ord, response)) % 53 == 0:
            os._exit(3)
        return None if len(response) % 7 == 6 else len(response)
"""
BOTH = [("slow", Problem("slow", "slow", "")), ("quick", Problem("quick", "quick", ""))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, where rewards find their modules and leave their marks."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Where a model and a tokenizer of characters are; a scripted engine decodes in the model's place."""
    return str(save_model(tmp_path_factory.mktemp("policy")))


def with_reward(folder, code):
    """The task whose reward is `code`, a module of the folder's own."""
    (folder / f"{folder.name}.py").write_text(textwrap.dedent(code))
    return DatasetTask(path="d.jsonl", reward=f"{folder.name}:reward", instruction="")


def actor(policy, task, engine, scorer):
    tokenizer, model = causal_lm.load_tokenizer(policy), causal_lm.load(policy)
    return Actor(task, tokenizer, model, engine, scorer, causal_lm.stop_ids(model, tokenizer))


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name}: never"
        time.sleep(0.01)


def test_a_reward_that_is_waited_for_holds_up_no_sampling_and_no_sampling_holds_up_a_reward(here, policy):
    def reply(prefix, max_tokens, seed):
        if prefix[0] == quick:
            return [EOS]
        if len(prefix) > 10:  # the last segment waits for a reward, and that reward for this segment
            wait_for(here / "the reward has begun")
            (here / "the reward may end").touch()
        return [5] * max_tokens

    shape = SamplerSettings(width=1, segment_tokens=4, max_depth=3)
    finished = []
    scorer = Scorer(task := with_reward(here, MEETING), ScoringSettings(timeout_s=60, workers=1))
    with actor(policy, task, ScriptedEngine(reply), scorer) as answering:
        (quick,) = answering.tokenizer.encode("q")
        rollouts = answering.sample(
            BOTH, answering.sampler(shape), 0, on_tree=lambda i, r: finished.append((i, r.problem_id))
        ).trees
    assert [(r.problem_id, r.rewards) for r in rollouts] == [("slow", [4.0]), ("quick", [5.0])]
    assert finished == [(1, "quick"), (0, "slow")]


def test_trees_are_told_of_in_the_order_in_which_they_are_scored_and_returned_in_that_of_the_problems(here, policy):
    def reply(prefix, max_tokens, seed):
        return [EOS] if prefix[0] == quick else [5] * max_tokens

    def told(index, rollout):
        finished.append(index)
        (here / "the reward may end").touch()  # the quick tree's, as soon as the slow one is done

    finished, progress = [], []
    shape = SamplerSettings(width=1, segment_tokens=4, max_depth=3)
    scorer = Scorer(task := with_reward(here, MEETING), ScoringSettings(timeout_s=60, workers=2))
    with actor(policy, task, ScriptedEngine(reply), scorer) as answering:
        (quick,) = answering.tokenizer.encode("q")
        rollouts = answering.sample(
            BOTH,
            answering.sampler(shape),
            0,
            on_tree=told,
            on_progress=lambda done, total: progress.append((done, total)),
        ).trees
    assert finished == [0, 1] and progress == [(1, 2), (2, 2)]
    assert [r.problem_id for r in rollouts] == ["slow", "quick"]


def letters(prefix, max_tokens, seed):
    rng = generator(seed)
    return [EOS if rng.random() < 0.1 else rng.randrange(1, 60) for _ in range(max_tokens)]


@pytest.mark.parametrize("order", [None, 1, 2])
def test_rollouts_are_those_of_sampling_first_and_then_scoring_leaf_by_leaf(here, policy, order):
    task = with_reward(here, MOODY)
    shapes = [SamplerSettings(width=width, segment_tokens=4, max_depth=4, retries=0) for width in (3, 8, 1, 5, 8)]
    problems = [(f"key {i}", Problem(f"p{i}", "?" * (i + 1), "42")) for i in range(len(shapes))]
    scorer = Scorer(task, ScoringSettings(timeout_s=60, workers=3))
    with actor(policy, task, ScriptedEngine(letters, shuffle=order, failure_rate=0.1), scorer) as answering:
        rollouts = answering.sample(problems, [answering.sampler(s) for s in shapes], 7).trees
        expected = []
        for (key, problem), shape in zip(problems, shapes, strict=True):
            grower = Sampler(ScriptedEngine(letters, failure_rate=0.1), shape, answering.decode, {EOS})
            (tree,) = grower.sample([(key, answering.encode(problem, shape.response_tokens))], 7)
            scores = {}
            for leaf in tree.leaves():
                if tree.nodes[leaf].stop is Stop.ERROR:
                    scores[leaf] = Score(None, tree.nodes[leaf].error)
                else:
                    (scores[leaf],) = scorer.score([(problem, answering.decode(tree.response(leaf)))])
            reasons = {leaf: score.reason for leaf, score in scores.items() if score.reason}
            expected.append(ScoredTree(problem.id, tree, [score.reward for score in scores.values()], reasons))
    assert rollouts == expected
    why = " ".join(why for r in rollouts for why in r.reasons.values())
    for part in ("scripted failure", "raised ValueError", "exited with status 3", "is None, not a number"):
        assert part in why, "the test wants rewards of every kind"
    assert sum(reward is not None for r in rollouts for reward in r.rewards) > 5


def test_an_actor_has_one_event_loop_for_all_its_calls_and_closes_what_it_has(here, policy):
    class Watching(ScriptedEngine):
        async def open(self, *args, **more):
            loops.append(asyncio.get_running_loop())
            return await super().open(*args, **more)

        async def close(self):
            loops.append(asyncio.get_running_loop())

    loops = []
    shape = SamplerSettings(width=2, segment_tokens=4, max_depth=3)
    task = with_reward(here, "def reward(prompt, response, answer):\n    return 1.0\n")
    scorer = Scorer(task, ScoringSettings(timeout_s=60, workers=1))
    with actor(policy, task, Watching(letters), scorer) as answering:
        for seed in range(2):
            answering.sample(BOTH, answering.sampler(shape), seed)
        answering.load_weights(3)
        assert answering.engine.version == 3
    assert len(loops) == 5 and len(set(loops)) == 1 and loops[0].is_closed()
    with pytest.raises(RuntimeError, match="after shutdown"):
        scorer.score([(BOTH[0][1], "x")])


def test_segments_that_are_short_for_the_cache_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(letters, granularity=16)
    for tokens, mode in ((32, "tree"), (31, "iid")):
        require_room(engine, SamplerSettings(segment_tokens=tokens, mode=mode))
    assert not caplog.records
    require_room(engine, SamplerSettings(segment_tokens=31))
    assert "less than two blocks" in caplog.text
