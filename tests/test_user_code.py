"""Classes of the user in every section that takes one: what is refused when it is read, and what when it is called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.support.random_trees import grow_random, rollout_of
from tests.support.small_runs import small_config
from treepo import Estimator, Forest, Problem, Settings, Totals
from treepo.advantages import CustomEstimator
from treepo.errors import ConfigError
from treepo.learner.loss import CustomLoss, TrainedTokens
from treepo.run.config import dump, load
from treepo.tasks import Teacher
from treepo.tasks.any import CustomTask, teacher_of
from treepo.tasks.program import ProgramTask
from treepo.user_code import Custom, imported

HERE = __name__


class Told:
    """Returns whatever it was told to, as an estimator, a loss or a task."""

    def __init__(self, value: Any = None, **more: Any) -> None:
        self.value, self.more = value, more

    def __call__(self, *_: Any) -> Any:
        return self.value


class OnlyForest:
    """Takes a forest, and nothing else."""

    def __call__(self, forest: Forest) -> Any:
        return np.zeros(forest.path.shape)


class Whitened(Estimator):
    """An estimator of a user that whitens."""

    scale: float = 2.0

    def values(self, forest: Forest) -> Any:
        return np.where(forest.path >= 0, self.scale * forest.rewards[:, None], 0.0)


class Bare:
    """The least that a task can be."""

    def problems(self, split: str) -> list[Problem]:
        return [Problem("p", "1+1=", "2")]

    def encode(self, tokenizer: Any, problem: Problem) -> list[int]:
        return [1, 2]

    def reward(self, problem: Problem, response: str) -> float:
        return 1.0


class Taught(ProgramTask):
    """A task that is a teacher too."""

    kind: str = "taught"  # type: ignore[assignment]


class Raising:
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no\nluck")


class Answers(Settings):
    """What `Answering` wants."""

    volume: int = 1

    def answer(self, question: str, *, loud: bool) -> str:
        return question * self.volume


class Answering(Custom):
    """A section of ours whose class must answer."""

    calls: ClassVar[dict[str, Any]] = {"answer": Answers.answer}


class Mute:
    """Does not answer."""


class Short:
    """Answers without asking how loud."""

    def answer(self, question: str) -> str:
        return question


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("Answers", {}, None),
        ("Answers", {"volume": 3}, None),
        ("Answers", {"volum": 3}, "unknown key of .*Answers; did you mean 'volume'"),
        ("Answers", {"volume": "x"}, "volume: .*valid integer"),
        ("Mute", {}, r"makes a Mute, which needs a method answer\(self, question, \*, loud\)"),
        ("Short", {}, r"must allow the call answer\(self, question, \*, loud\): .*loud"),
        ("Raising", {}, r"raised RuntimeError: no$"),
        ("Answer", {}, "'Answer' in .* does not exist; did you mean 'Answers'"),
        ("HERE", {}, "is not callable"),
    ],
)
def test_a_class_is_checked_when_its_section_is_read(kind: str, more: dict[str, Any], why: str | None) -> None:
    values = {"kind": f"{HERE}:{kind}", **more}
    if why is None:
        section = Answering.model_validate(values)
        assert section.model_dump() == values  # it can be written and read again
        assert section.made.answer("a", loud=True) == "a" * more.get("volume", 1)
        return
    with pytest.raises(ValidationError) as caught:
        Answering.model_validate(values)
    message = caught.value.errors()[0]["msg"]
    assert "\n" not in message
    assert re.search(why, message), message


def test_a_module_that_is_missing_or_breaks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaks_on_import.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="cannot import 'breaks_on_import': ZeroDivisionError: division by zero"):
        imported("breaks_on_import:Thing")
    with pytest.raises(ConfigError, match="cannot import 'nowhere_at_all': ModuleNotFoundError"):
        imported("nowhere_at_all:Thing")


FOREST = Forest.of([rollout_of(grow_random(3), 3), rollout_of(grow_random(4), 4)])


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (3.0, r"returned 3\.0: it must return an array of shape"),
        (np.zeros(3), r"returned .*of shape \(3,\): it must return an array of shape"),
        (np.full(FOREST.path.shape, np.nan), "returned values that are not finite"),
    ],
)
def test_wrong_advantages_are_refused(value: Any, why: str) -> None:
    estimator = CustomEstimator.model_validate({"kind": f"{HERE}:Told", "value": value})
    with pytest.raises(ConfigError, match=why):
        estimator(FOREST)


def test_right_advantages_of_any_class_are_taken_and_estimators_whiten() -> None:
    zeros = CustomEstimator.model_validate({"kind": f"{HERE}:OnlyForest"})(FOREST)
    assert zeros.shape == FOREST.path.shape and not zeros.any()
    plain = CustomEstimator.model_validate({"kind": f"{HERE}:Whitened", "scale": 5.0})(FOREST)
    white = CustomEstimator.model_validate({"kind": f"{HERE}:Whitened", "whiten": True})(FOREST)
    tokens = np.where(FOREST.path >= 0, FOREST.length[FOREST.path], 0)
    assert set(plain[FOREST.path >= 0]) == {0.0, 5.0}
    assert (tokens * white).sum() == pytest.approx(0, abs=1e-9)


TOKENS = TrainedTokens(*(torch.zeros(2) if field not in (1, 3) else None for field in range(7)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [None, torch.zeros(()), (torch.zeros(2), {}), (torch.zeros(()), "metrics"), (1.0, {})]
)
def test_a_wrong_loss_is_refused(value: Any) -> None:
    loss = CustomLoss.model_validate({"kind": f"{HERE}:Told", "value": value})
    with pytest.raises(ConfigError, match=r"it must return \(a scalar tensor, a dict of scalar tensors\)"):
        loss(TOKENS, Totals(2.0, 1))


def test_the_attributes_of_a_loss_are_optional() -> None:
    loss = CustomLoss.model_validate({"kind": f"{HERE}:Told", "value": (torch.zeros(()), {})})
    assert (loss.shared_tokens, loss.needs_reference, loss.over_responses) == ("sum", False, False)
    assert loss(TOKENS, Totals(2.0, 1))[1] == {}


def test_the_least_of_a_task_is_a_task_and_a_teacher_is_found_in_one() -> None:
    bare = CustomTask.model_validate({"kind": f"{HERE}:Bare"})
    assert bare.isolated and bare.final_answer("\\boxed{2}") is None and bare.encode(None, bare.problems("test")[0])  # type: ignore[arg-type]
    assert teacher_of(bare) is None
    taught = CustomTask.model_validate({"kind": f"{HERE}:Taught", "train_problems": 4})
    assert isinstance(teacher_of(taught), Teacher) and not taught.isolated
    assert isinstance(teacher_of(ProgramTask()), Teacher)


@pytest.mark.parametrize(
    "override",
    [
        f"task={{kind: '{HERE}:Bare'}}",
        f"advantage={{kind: '{HERE}:Whitened', scale: 3.0}}",
        f"loss={{kind: '{HERE}:Told'}}",
    ],
)
def test_a_configuration_with_a_class_of_the_user_is_read_back_as_it_was(tmp_path: Path, override: str) -> None:
    config = small_config(tmp_path, override)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config
